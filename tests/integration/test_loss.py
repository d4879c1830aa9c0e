"""Losses that bend: any function of log-probabilities is learned as autograd learns it from all logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import set_seed

from loractl.common.job.sections import PreferenceSpec
from loractl.common.memory.step import HEAD_CHUNK
from loractl.worker.base.arithmetic import evaluating
from loractl.worker.base.model import Learner
from loractl.worker.data.row_forms import with_prompts
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loss import (
    Backward,
    BentLoss,
    CrossEntropy,
    LearnedTokens,
    Loss,
    LossLog,
    MicroBatch,
    TokenLoss,
    learned_in,
    window_of,
)
from loractl.worker.engine.optimizer import ScaledOptimizer
from loractl.worker.engine.pairs import PairLoss
from loractl.worker.engine.passes.choice import forward_pass
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.engine.ranks.part import Part

from .test_engine import PAD
from .test_engine import rows as token_rows
from .test_lean import FP32, SMALL, adapted, base_of, spec_of


class Preference(BentLoss):
    """DPO's (arXiv:2305.18290): a row holds the chosen answer, and behind `starts` the rejected one. `reference`: the
    log-probabilities of both by the base, by row number."""

    def __init__(self, reference: Mapping[int, Sequence[float]], beta: float) -> None:
        self.reference, self.beta = reference, beta

    def count(self, rows: Sequence[TokenRow]) -> int:
        return len(rows)

    def summed(self, logp: torch.Tensor, tokens: LearnedTokens) -> torch.Tensor:
        assert logp.dtype == torch.float32
        reference = torch.tensor([self.reference[row.number] for row in tokens.rows])
        own = torch.zeros_like(reference).index_put((tokens.row_of, tokens.example_of), logp, accumulate=True)
        chosen, rejected = (own - reference).unbind(1)
        return -F.logsigmoid(self.beta * (chosen - rejected)).sum()


def pairs(count: int, seed: int = 0, lengths: range = range(9, 50)) -> list[TokenRow]:
    """Rows with two answers to one prompt. Only the answers are learned."""
    drawn, rows = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids, labels, starts = list[int](), list[int](), list[int]()
        prompt = torch.randint(3, 250, (5,), generator=drawn).tolist()
        for length in torch.randint(lengths.start, lengths.stop, (2,), generator=drawn).tolist():
            answer = torch.randint(3, 250, (length - len(prompt),), generator=drawn).tolist()
            starts.append(len(ids))
            ids, labels = [*ids, *prompt, *answer], [*labels, *[IGNORED] * len(prompt), *answer]
        rows.append(TokenRow(number=7 * number + seed, input_ids=ids, labels=labels, starts=tuple(starts[1:])))
    return rows


def preference(rows: Iterable[TokenRow], beta: float = 0.1) -> Preference:
    """With a reference for each row, near to what a model without knowledge of words says: where the loss bends."""
    reference = {}
    for row in rows:
        likely = [-math.log(300) * learned_in([answer]) for answer in answers(row)]
        reference[row.number] = (likely[0] + 4 * (row.number % 5), likely[1] + 3 * (row.number % 4))
    return Preference(reference, beta)


def answers(row: TokenRow) -> list[TokenRow]:
    (border,) = row.starts
    return [
        replace(row, input_ids=row.input_ids[s], labels=row.labels[s], starts=())
        for s in (slice(border), slice(border, None))
    ]


def plainly(model: Any, rows: Sequence[TokenRow], loss: Preference) -> torch.Tensor:
    """The summed loss by the model's own code, one answer at a time."""

    def logp(row: TokenRow) -> torch.Tensor:
        whole = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].log_softmax(-1)
        expected = torch.tensor(row.labels[1:])
        learned = expected != IGNORED
        return whole[learned].gather(1, expected[learned][:, None]).sum()

    total = torch.zeros(())
    for row in rows:
        chosen, rejected = (
            logp(one) - by_base for one, by_base in zip(answers(row), loss.reference[row.number], strict=True)
        )
        total = total - F.logsigmoid(loss.beta * (chosen - rejected))
    return total


def by_autograd(forward: Any, rows: Sequence[TokenRow], loss: Preference) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss and its gradients by a plain model in fp64 that has the pass's weights."""
    plain = adapted(base_of("Llama"), spec_of()).double()
    plain.load_state_dict(forward.model.state_dict())
    total = plainly(plain, rows, loss)
    total.backward()
    return total.item(), gradients(plain)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learn(
    forward: Any, *batches: MicroBatch, backward: Backward = torch.autograd.backward
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a window, and the gradients that it leaves."""
    forward.model.zero_grad()
    total = sum(float(forward.learn(batch, backward)) for batch in batches)
    return total, gradients(forward.model)


def window(*pieces: Sequence[TokenRow], loss: Loss) -> list[MicroBatch]:
    return window_of(loss, list(map(list, pieces)))


def near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Each gradient within 1e-5 of its norm."""
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) < 1e-5 * float(gradient.norm()), name


def lean(loss: TokenLoss) -> LeanPass:
    return LeanPass(adapted(base_of("Llama"), spec_of()), FP32, loss=loss)


def plain(loss: TokenLoss) -> LeanPass:
    return LeanPass(adapted(base_of("Llama"), spec_of()), FP32, loss=loss, fuses=False)


def padded(loss: TokenLoss) -> PaddedPass:
    return PaddedPass(adapted(base_of("Llama"), spec_of()), PAD, loss=loss)


@pytest.mark.parametrize("way", [lean, plain, padded])
def test_a_loss_of_pairs_is_learned_as_autograd_learns_it_from_all_logits(way: Callable[[TokenLoss], Any]) -> None:
    rows = pairs(9)
    assert learned_in(rows) > HEAD_CHUNK
    loss = preference(rows)
    forward = way(loss)
    value, ours = learn(forward, *window(rows, loss=loss))
    total, theirs = by_autograd(forward, rows, loss)
    assert value == pytest.approx(total / len(rows), rel=1e-6)
    near({name: len(rows) * gradient for name, gradient in ours.items()}, theirs)
    with evaluating(forward.model):
        assert forward.held_out_loss(rows) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("way", [lean, plain, padded])
def test_held_out_pairs_have_the_same_loss_in_batches_of_any_size(way: Callable[[TokenLoss], Any]) -> None:
    """Also the term for their answers, which a step takes the mean of over its micro-batch."""
    rows = pairs(5)
    forward = way(PairLoss(PreferenceSpec(loss_type=["simpo", "sft"])))
    with evaluating(forward.model):
        alone = [forward.held_out_loss([row]) for row in rows]
        assert forward.held_out_loss(rows) == pytest.approx(sum(alone), rel=1e-6)


def test_a_job_s_pass_learns_by_the_loss_that_it_is_given() -> None:
    loss, found = preference(pairs(1)), []
    for exact in (False, True):
        spec = spec_of(training={"exact": exact})
        model = adapted(base_of("Llama"), spec)
        learner = Learner(model=model, tokenizer=SimpleNamespace(pad_token_id=PAD), precision=FP32)
        forward, _ = forward_pass(learner, spec, 40, loss=loss)
        assert forward.loss is loss
        assert forward_pass(learner, spec, 40)[0].loss == CrossEntropy()
        found.append(type(forward))
    assert found == [LeanPass, PaddedPass]


@pytest.mark.parametrize("way", [lean, plain])
def test_the_head_sees_a_chunk_at_a_time_and_at_first_without_a_graph(way: Callable[[TokenLoss], Any]) -> None:
    rows, seen = pairs(12), list[tuple[int, bool]]()
    forward = way(loss := preference(rows))
    head = forward.model.get_base_model().lm_head
    head.requires_grad_(True)  # a trained head has a graph whatever it is given
    head.register_forward_hook(lambda _, __, out: seen.append((out[..., 0].numel(), out.requires_grad)))
    learn(forward, *window(rows, loss=loss))
    tokens = learned_in(rows)
    chunks = [HEAD_CHUNK] * (tokens // HEAD_CHUNK) + [tokens % HEAD_CHUNK]
    assert len(chunks) > 1 and seen == [(size, graph) for graph in (False, True) for size in chunks]


@pytest.mark.parametrize("name", ["dpo", "simpo and answers", "orpo"])
@pytest.mark.parametrize("way", [lean, plain, padded])
def test_a_window_learns_the_same_however_it_is_cut(way: Callable[[TokenLoss], Any], name: str) -> None:
    """Memory decides how: a term for answers is a mean over the tokens of all of them, as of one micro-batch in TRL."""
    rows = pairs(4)
    found: dict[str, tuple[Sequence[TokenRow], TokenLoss]] = {
        "dpo": (rows, preference(rows)),
        "simpo and answers": (rows, PairLoss(PreferenceSpec(loss_type=["simpo", "sft"], loss_weights=[1.0, 0.5]))),
        "orpo": (with_prompts(rows), PairLoss(PreferenceSpec(loss_type="orpo"))),
    }
    rows, loss = list(found[name][0]), found[name][1]
    forward = way(loss)
    expected, theirs = learn(forward, *window(rows, loss=loss))
    for cut in ([rows[:2], rows[2:]], [[row] for row in rows]):
        value, ours = learn(forward, *window(*cut, loss=loss))
        assert value == pytest.approx(expected, rel=1e-6)
        near(ours, theirs)


def test_a_router_s_loss_counts_once_a_window() -> None:
    """Four times the same row, so that the load of the experts is the same however the window is cut."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SMALL, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    )
    forward, rows = PaddedPass(adapted(transformers.MixtralForCausalLM(config), spec_of()), PAD), token_rows(1) * 4
    expected, theirs = learn(forward, *window(rows, loss=forward.loss))
    for cut in ([rows[:2], rows[2:]], [[row] for row in rows]):
        value, ours = learn(forward, *window(*cut, loss=forward.loss))
        assert value == pytest.approx(expected, rel=1e-6)
        near(ours, theirs)


@pytest.mark.parametrize("way", [lean, plain, padded])
def test_the_scale_of_float16_is_in_the_gradients_and_not_in_the_loss(way: Callable[[TokenLoss], Any]) -> None:
    rows = pairs(3)
    forward = way(loss := preference(rows))
    optimizer = ScaledOptimizer(torch.optim.AdamW([torch.zeros(1)]), torch.amp.GradScaler("cpu"))
    value, ours = learn(forward, *window(rows, loss=loss), backward=optimizer.backward)
    expected, theirs = learn(forward, *window(rows, loss=loss))
    assert optimizer.scaler is not None and value == expected
    scale = optimizer.scaler.get_scale()
    assert scale > 1000
    near({name: gradient / scale for name, gradient in ours.items()}, theirs)


class Unlikely(BentLoss):
    """Cross-entropy, told as a loss that bends."""

    def count(self, rows: Sequence[TokenRow]) -> int:
        return learned_in(rows)

    def summed(self, logp: torch.Tensor, tokens: LearnedTokens) -> torch.Tensor:
        return -logp.sum()


def test_a_head_that_drops_drops_the_same_twice() -> None:
    """And what is drawn next does not depend on the loss."""
    rows, found = pairs(9), list[tuple[float, dict[str, torch.Tensor]]]()
    for loss in (Unlikely(), CrossEntropy()):
        forward = lean(loss)
        head = forward.model.get_base_model().lm_head
        head.register_forward_pre_hook(lambda _, given: F.dropout(given[0], 0.5))
        set_seed(3)
        found.append(learn(forward, *window(rows, loss=loss)))
        found[-1][1]["drawn next"] = torch.rand(3)
    (value, ours), (expected, theirs) = found
    assert value == pytest.approx(expected, rel=1e-6)
    near(ours, theirs)


def test_rows_of_which_nothing_is_learned_teach_a_bent_loss_nothing() -> None:
    rows = [replace(row, labels=[IGNORED] * len(row.labels)) for row in pairs(2)]
    assert learn(lean(loss := preference(rows)), *window(rows, loss=loss)) == (0.0, {})


@dataclass
class OtherRank:
    """A link of two ranks that work one after the other: the second one's sums wait here for the leader."""

    rank: int = 1
    size: int = 2
    waiting: list[torch.Tensor] = field(default_factory=list)

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def any(self, here: bool) -> bool:
        return here

    def sum_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            if self.rank:
                self.waiting.append(tensor.clone())
            else:
                tensor += self.waiting.pop(0)


@pytest.mark.parametrize("answers_too", [False, True])
@pytest.mark.parametrize("way", [lean, padded])
def test_ranks_that_divide_pairs_learn_what_one_learns(way: Callable[[TokenLoss], Any], answers_too: bool) -> None:
    rows = pairs(5)
    loss = PairLoss(PreferenceSpec(loss_type=["simpo", "sft"])) if answers_too else preference(rows)
    forward, link = way(loss), OtherRank()
    batches = window(rows[:4], rows[4:], loss=loss)  # of the last one the second rank has none
    expected, theirs = learn(forward, *batches)
    for link.rank in (1, 0):
        part: Any = Part(forward, link, lockstep=False)  # type: ignore[arg-type]
        part.begin_window()
        value = sum(float(part.learn(batch, torch.autograd.backward)) for batch in batches)
    assert value == pytest.approx(expected, rel=1e-6)
    near(gradients(forward.model), theirs)
    for link.rank in (1, 0):
        with evaluating(forward.model):
            measured = Part(forward, link, lockstep=False).held_out_loss(rows)  # type: ignore[arg-type]
    with evaluating(forward.model):
        assert measured == pytest.approx(forward.held_out_loss(rows), rel=1e-6)


def test_the_losses_of_steps_before_and_after_a_resume_are_summed_as_without_one() -> None:
    """A checkpoint between two lines of the log: each step counts once, in the next line and in the mean."""
    losses = [torch.tensor(loss) for loss in (4.0, 2.0, 1.0, 0.5, 0.25)]
    whole, begun, resumed = (LossLog(torch.device("cpu")) for _ in range(3))
    for step, loss in enumerate(losses, start=1):
        whole.add(loss)
        log = begun if step <= 3 else resumed
        log.add(loss)
        if step == 2:
            assert whole.take(step) == begun.take(step) == 3.0
        if step == 3:
            resumed.restore(begun.state())
            begun.add(torch.tensor(9.0))  # what the checkpoint holds stays as it is
    assert resumed.mean(5) == whole.mean(5) == 7.75 / 5
    assert resumed.take(5) == whole.take(5) == 1.75 / 3
