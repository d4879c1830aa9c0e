"""Jobs that learn from pairs: their loss, their reference, alone and beside jobs that learn answers."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from loractl.common.job.method import Method
from loractl.common.job.sections import DataFormat, PreferenceSpec
from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import draws, evaluating
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Learner
from loractl.worker.data.row_forms import form_of, with_prompts
from loractl.worker.data.token_rows import TokenRows
from loractl.worker.data.tokens import IGNORED, TokenRow, unlearned
from loractl.worker.engine.loss import LearnedTokens, window_of
from loractl.worker.engine.pairs import PairLoss, Sizes
from loractl.worker.engine.passes.choice import forward_pass
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.protocol.messages import Start, Stepped
from loractl.worker.recipe.fit import largest_batch
from loractl.worker.recipe.kinds import trained_kind
from loractl.worker.recipe.reference import FrozenReference

from .conftest import Recipe
from .test_engine import PAD
from .test_lean import FP32, adapted, base_of, spec_of
from .test_loss import pairs as answer_pairs
from .test_stopped_evaluation import weights

PAIRS: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 2e-3}


def pairs(path: Path, count: int = 60) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"item {n} of {n % 7}?"}],
            "chosen": [{"role": "assistant", "content": f"number {n * 3} " + "and good " * (1 + n % 3)}],
            "rejected": [{"role": "assistant", "content": f"bad {n % 5} " * (1 + n % 4)}],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What `start` and `recipe` take for a job on pairs."""
    data = pairs(tmp_path / "pairs.jsonl")

    def keys(preference: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        job = {"task_type": "preference", "preference": preference or {}, **more.pop("job", {})}
        dataset = {"path": str(data), **more.pop("dataset", {})}
        return {**PAIRS, "dataset": dataset, "job": job, "evaluation": {"samples": 1}, **more}

    return keys


def losses(told: list[Any]) -> list[float]:
    return [m.metrics["loss"] for m in told if isinstance(m, Stepped) and "loss" in m.metrics]


def test_a_pair_is_one_row_with_both_answers_behind_the_same_prompt(tmp_path: Path, tiny_model: Path) -> None:
    from loractl.common.data.formats import parse_each
    from loractl.common.data.rows import open_rows
    from loractl.worker.base.model import load_tokenizer

    file, tokenizer = pairs(tmp_path / "pairs.jsonl", 3), load_tokenizer(str(tiny_model))
    (example, *_), refused = parse_each(open_rows(file, "train"), DataFormat.PREFERENCE, file)
    form = form_of(DataFormat.PREFERENCE)
    (row,) = form.encode(example, tokenizer)
    chosen, rejected = form.texts(row)
    assert not refused
    assert [tokenizer.decode(text.input_ids) for text in (chosen, rejected)] == [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "item 0 of 0?"}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for answer in ("number 0 and good ", "bad 0 ")
    ]
    learned = [tokenizer.decode([label for label in text.labels if label != IGNORED]) for text in (chosen, rejected)]
    assert learned == ["number 0 and good <|im_end|>", "bad 0 <|im_end|>"]


@pytest.mark.parametrize("exact", [False, True])
def test_the_batch_that_is_tried_is_as_large_as_any_that_comes(exact: bool) -> None:
    """A padded pair is as long as its longer answer makes it, a lean one as long as both."""
    lengths = [(20, 20), (9, 30), (28, 5), (25, 10), (19, 19)]
    ids = [[[3 + n] * chosen, [4 + n] * rejected] for n, (chosen, rejected) in enumerate(lengths)]
    rows = [TokenRow(number=n, input_ids=a + b, labels=a + b, starts=(len(a),)) for n, (a, b) in enumerate(ids)]
    model, loss = adapted(base_of("Llama"), spec_of()), PairLoss(PreferenceSpec())
    forward = PaddedPass(model, PAD, loss=loss) if exact else LeanPass(model, FP32, loss=loss)
    loop = SimpleNamespace(forward=forward, args=SimpleNamespace(per_device_train_batch_size=2))
    run: Any = SimpleNamespace(cards=1, spec=spec_of(task_type="preference"))
    tried = largest_batch(SimpleNamespace(trained_rows=TokenRows.of(rows)), run, loop)  # type: ignore[arg-type]
    assert forward.tokens(tried) == max(map(forward.tokens, itertools.combinations(rows, 2))) == (120 if exact else 79)


def test_the_first_loss_is_that_of_a_model_which_is_its_own_reference(recipe: Recipe, asked: Any) -> None:
    ended, told = recipe("a", **asked())
    found = losses(told)
    assert ended.reason is Reason.OK
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_training_that_goes_on_after_a_stop_leaves_the_same_adapter(
    recipe: Recipe, asked: Any, tmp_path: Path, method: str
) -> None:
    keys = asked({"loss_type": ["sigmoid", "sft"]}, method=method, eval_steps=2, gradient_accumulation_steps=2)
    recipe("whole", **keys)
    recipe("begun", stop_after=3, **keys)
    recipe("resumed", resume="begun", **keys)
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")


@pytest.mark.long
def test_the_adapter_that_a_job_begins_from_is_its_reference(
    recipe: Recipe, start: Callable[..., Start], asked: Any, tmp_path: Path
) -> None:
    from loractl.worker.protocol.messages import Ancestor
    from loractl.worker.recipe.recipe import train
    from loractl.worker.recipe.run import Run

    recipe("first", max_steps=4)
    told: list[Any] = []
    folder = tmp_path / "first" / "result" / "adapter"
    order = start("second", job_id=2, **asked(lora={"init_from": "1"}, dtype="float32"))
    ancestor = Ancestor(job_id=1, name="tiny", sha256="0" * 64, path=str(folder))
    order = order.model_copy(update={"init_from": ancestor})
    state = Run(order=order, tell=told.append)
    assert train(state).reason is Reason.OK
    assert losses(told)[0] == pytest.approx(math.log(2), abs=1e-6), "the base prefers otherwise than this adapter"
    measured = json.loads((tmp_path / "second" / "result" / "report.json").read_text())["evaluation"]["metrics"]
    (loss,) = [metric for metric in measured if metric["name"] == "loss"]
    assert loss["base"] == pytest.approx(math.log(2), abs=1e-6), "the report has the same reference"


def rows_of(count: int, tokens: int = 12) -> list[TokenRow]:
    ids = [[3 + (n * 37 + at * 11) % 250 for at in range(2 * tokens)] for n in range(count)]
    labels = [[IGNORED] * 4 + row[4:tokens] + [IGNORED] * 4 + row[tokens + 4 :] for row in ids]
    return [
        TokenRow(number=n, input_ids=row, labels=label, starts=(tokens,))
        for n, (row, label) in enumerate(zip(ids, labels, strict=True))
    ]


LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": PAD, "initializer_range": 0.2,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    **LIKE_LLAMA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    **LIKE_LLAMA, "num_hidden_layers": 4, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

WITHOUT_POSITIONS: dict[str, dict[str, Any]] = {
    "Qwen3Next": {**LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Qwen3_5Text": LINEAR,
    "Lfm2": {**LIKE_LLAMA, "layer_types": ["conv", "full_attention"]},
    "Bamba": {**MAMBA, "attn_layer_indices": [1]},
    "NemotronH": {
        **LIKE_LLAMA, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "head_dim": 8,
    },
    "GraniteMoeHybrid": {
        **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "num_local_experts": 0,
    },
    "Zamba2": {
        **LIKE_LLAMA, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
        "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "adapter_rank": 4,
        "num_key_value_heads": 4,
    },
    "FalconH1": {**MAMBA, "mamba_d_ssm": 64},
    "RecurrentGemma": {**LIKE_LLAMA, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "Mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
    "Bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "OlmoHybrid": {**LIKE_LLAMA, "num_hidden_layers": 4},
}  # fmt: skip
"""Bases in which a text does not begin where position ids restart: states, convolutions, biases for distances."""


@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_the_rejected_answer_does_not_see_the_chosen_one(family: str) -> None:
    """Whatever the base does with positions, a model is at first its own reference; held-out pairs choose the best
    step."""
    config = getattr(transformers, f"{family}Config")(**WITHOUT_POSITIONS[family])
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config)
    first, held_out = first_losses(base, "q_proj" if family in ("NemotronH", "FalconH1") else "all-linear")
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert held_out == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("family, sizes", [
    ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "embd_pdrop": 0.3, "resid_pdrop": 0.3, "attn_pdrop": 0.3}),
    ("OPT", {
        "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3,
    }),
    ("Falcon", {  # its code reads the config's number in each pass
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.3,
        "attention_dropout": 0.3,
    }),
])  # fmt: skip
def test_a_base_s_own_dropout_is_off_for_pairs_and_an_adapter_s_stays(family: str, sizes: dict[str, Any]) -> None:
    """As TRL has it, but there an adapter's is off as well, whatever the job says; ours is off by default."""
    config = getattr(transformers, f"{family}Config")(vocab_size=300, pad_token_id=PAD, **sizes)
    base = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for found in first_losses(base, "all-linear"):
        assert found == pytest.approx(math.log(2), abs=1e-4)
    for task, dropout, acts in (("preference", 0.0, False), ("preference", 0.25, True), ("CAUSAL_LM", 0.0, True)):
        spec = spec_of(task_type=task, lora={"lora_dropout": dropout})
        base = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
        assert draws(add_adapter(base, spec, Method.LORA)) == acts


def first_losses(base: Any, targets: str, **sections: Any) -> tuple[float, float]:
    """A pair's loss on a fresh adapter, at a beta that shows any difference to the reference: in a step, and held
    out."""
    named = targets if targets == "all-linear" else [targets]
    spec = spec_of(task_type="preference", lora={"target_modules": named}, preference={"beta": 1.0}, **sections)
    model = add_adapter(base, spec, Method.LORA).train()
    learner = Learner(model=model, tokenizer=SimpleNamespace(pad_token_id=PAD, eos_token_id=2), precision=FP32)
    kind, rows = trained_kind(spec), answer_pairs(4)
    loss = kind.loss(spec)
    forward, _ = forward_pass(learner, spec, 100, loss=loss)
    kind.refer(loss, replace(learner, scorer=forward if isinstance(forward, LeanPass) else None))
    loss.meet(rows)
    first = sum(float(forward.learn(batch, torch.autograd.backward)) for batch in window_of(loss, [rows[:1], rows[1:]]))
    with evaluating(model):
        return first, forward.held_out_loss(rows) / len(rows)


class Known:
    """A reference that is known."""

    def meet(self, rows: Any) -> None: ...

    def of(self, row: TokenRow) -> tuple[float, float]:
        return -3.0 - row.number, -2.0 + row.number


def by_hand(name: str, asked: PreferenceSpec, logp: torch.Tensor) -> torch.Tensor:
    """The loss of three pairs of eight tokens an answer, by the papers' formulas."""
    each = logp.view(3, 2, 8)
    chosen, rejected = each.sum(-1).unbind(1)
    margins = (chosen - rejected) - (torch.tensor([-3.0, -4.0, -5.0]) - torch.tensor([-2.0, -1.0, 0.0]))
    beta = asked.beta
    if name == "sigmoid":
        return -torch.log(torch.sigmoid(beta * margins)).sum()
    if name == "hinge":
        return (1 - beta * margins).clamp(min=0).sum()
    if name == "ipo":
        return ((margins / 8 - 1 / (2 * beta)) ** 2).sum()
    if name == "robust":
        right, wrong = (-F.logsigmoid(beta * margins), -F.logsigmoid(-beta * margins))
        return ((0.9 * right - 0.1 * wrong) / 0.8).sum()
    chosen, rejected = (each.mean(-1)).unbind(1)
    if name == "simpo":
        return -F.logsigmoid(beta * (chosen - rejected) - 0.7).sum()
    odds = torch.log(chosen.exp() / (1 - chosen.exp())) - torch.log(rejected.exp() / (1 - rejected.exp()))
    return (-beta * F.logsigmoid(odds)).sum() - 3 * chosen.mean()


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "simpo", "orpo"])
def test_a_loss_is_its_paper_s(name: str) -> None:
    smoothing = 0.1 if name == "robust" else 0.0
    asked = PreferenceSpec(loss_type=name, beta=0.4, label_smoothing=smoothing, simpo_gamma=0.7)
    rows = rows_of(3)
    tokens = LearnedTokens.of(rows, torch.device("cpu"))
    logp = (-torch.rand(3 * 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.1).requires_grad_()
    loss = PairLoss(asked, Known() if asked.has_reference else None)
    found, expected = loss.summed(logp, tokens), by_hand(name, asked, logp)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    slopes = [torch.autograd.grad(value, logp, retain_graph=True)[0] for value in (found, expected)]
    assert torch.allclose(*slopes, rtol=1e-6)


def test_each_answer_s_mean_is_over_its_own_tokens() -> None:
    row = rows_of(1)[0]
    row = replace(
        row, labels=[*row.labels[:-3], *[IGNORED] * 3]
    )  # 8 tokens are learned of the chosen answer, 5 of the other
    tokens = LearnedTokens.of([row], torch.device("cpu"))
    logp = -torch.rand(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.1
    found = PairLoss(PreferenceSpec(loss_type="simpo", beta=0.4, simpo_gamma=0.7)).summed(logp, tokens)
    assert float(found) == pytest.approx(float(-F.logsigmoid(0.4 * (logp[:8].mean() - logp[8:].mean()) - 0.7)))


def test_several_losses_are_added_by_their_weights() -> None:
    rows = rows_of(3)
    tokens = LearnedTokens.of(rows, torch.device("cpu"))
    logp = -torch.rand(3 * 16, generator=torch.Generator().manual_seed(1))

    def loss(*names: str, weights: list[float] | None = None) -> float:
        asked = PreferenceSpec(loss_type=list(names), loss_weights=weights)
        return float(PairLoss(asked, Known()).summed(logp, tokens))

    answers = -3 * float(logp.view(3, 2, 8)[:, 0].mean())
    assert loss("sigmoid", "sft", weights=[1.0, 0.5]) == pytest.approx(loss("sigmoid") + 0.5 * answers)
    assert loss("hinge", "ipo", weights=[2.0, 3.0]) == pytest.approx(2 * loss("hinge") + 3 * loss("ipo"))


def test_orpo_learns_on_where_an_answer_is_certain() -> None:
    """Short answers that are known by heart have a probability of 1 in fp32, whose odds are infinite."""
    tokens = LearnedTokens.of(rows_of(3), torch.device("cpu"))
    logp = torch.full((3 * 16,), -1.0)
    logp[:8], logp[24:32] = 0.0, 0.0  # the first row's chosen answer, and the second one's rejected one
    value = PairLoss(PreferenceSpec(loss_type="orpo")).summed(logp.requires_grad_(), tokens)
    value.backward()
    assert torch.isfinite(value)
    assert logp.grad is not None and bool(torch.isfinite(logp.grad).all())


@pytest.mark.long
def test_a_padded_pair_s_reference_does_not_depend_on_the_pairs_beside_it() -> None:
    """Else a training that goes on after a stop, or meets what another one knows, would leave another adapter."""
    model, rows = adapted(base_of("Llama"), spec_of()), answer_pairs(12)
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=2)
    learner = Learner(model=model, tokenizer=tokenizer, precision=FP32)
    together, alone = FrozenReference(learner), FrozenReference(learner)
    together.meet(rows)
    for row in rows:
        alone.meet([row])
    assert [together.of(row) for row in rows] == [alone.of(row) for row in rows]


def test_orpo_s_prompt_ends_where_the_chosen_answer_begins() -> None:
    """A token that crosses the border counts as prompt, so that both prompts may have other numbers of tokens."""
    ids = [5, 6, 40, 41, 5, 6, 7, 50, 51]
    labels = [IGNORED, IGNORED, 40, 41, IGNORED, IGNORED, IGNORED, 50, 51]
    row = TokenRow(number=1, input_ids=ids, labels=labels, starts=(4,))
    (learned,) = with_prompts([row])
    assert Sizes.of(row) == Sizes(asked=0, chosen=2, rejected=2)
    assert Sizes.of(learned) == Sizes(asked=1, chosen=2, rejected=2)


def test_what_others_say_within_a_chosen_answer_is_learned_by_orpo_no_more_than_by_others() -> None:
    ids = [5, 6, 40, 8, 9, 42, 5, 6, 50]
    labels = [IGNORED, IGNORED, 40, IGNORED, IGNORED, 42, IGNORED, IGNORED, 50]
    row = TokenRow(number=1, input_ids=ids, labels=labels, starts=(6,))
    (learned,) = with_prompts([row])
    assert learned.labels == [IGNORED, 6, *labels[2:]]
    assert Sizes.of(learned) == Sizes(asked=1, chosen=2, rejected=1)
    chosen, _ = form_of(DataFormat.PREFERENCE).texts(row)
    assert unlearned(chosen).input_ids == [5, 6] == unlearned(chosen).labels, "as the report measures it"
