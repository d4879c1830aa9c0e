"""Which forward pass a job gets: the lean one if rows can be told apart without padding, and if it computes on this
device what peft's own does; else the padded one, which is peft's own."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch

from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.memory.families import ROW_ATTENTION
from loractl.worker.base.arithmetic import Precision, evaluating, random_streams_kept, trained_weights, undrawing
from loractl.worker.base.gauge import is_out_of_memory, release
from loractl.worker.base.model import Learner
from loractl.worker.base.processor import arithmetic
from loractl.worker.base.source import first_line
from loractl.worker.data.row_forms import with_prompts
from loractl.worker.data.tokens import IGNORED, TokenRow, joined
from loractl.worker.engine.loss import UNSMOOTHED, BentLoss, Loss, TokenLoss, window_of
from loractl.worker.engine.pairs import PairLoss
from loractl.worker.protocol.exit_reason import card_error

from . import wide
from .check_cache import CheckCache
from .lean import LeanPass
from .padded import PaddedPass

TOLERANCE = 0.01
"""Share of the largest logit that rounding may move; another row in sight, or a scale left out, moves far more."""

KERNELS = 0.05
"""TOLERANCE between two kernels for the same numbers in 16 bit: a real model of 30 layers moves by more than 0.01.
Two ways to compute attention differ so, and on a card products with other numbers of rows: cuBLAS, and bitsandbytes for
NF4, pick kernels by that number."""

COMPARED = 4
"""Tokens compared at each row's end: logits of a long row would take gigabytes."""


def forward_pass(
    learner: Learner,
    spec: JobSpec,
    longest: int,
    *,
    checks: CheckCache | None = None,
    loss: Loss = UNSMOOTHED,
    divided: bool = False,
) -> tuple[LeanPass | PaddedPass, str | None]:
    """The forward pass of a job whose longest row has that many tokens; and, if the job did not ask for it, why it is
    the padded one. `checks`: what this box has checked before. `divided`: between several cards,
    whose pass is not compared with peft's."""
    training = spec.training
    padded = PaddedPass(
        learner.model,
        learner.tokenizer.pad_token_id,
        compiled=training.torch_compile,
        noise=training.neftune_noise_alpha,
        loss=loss,
    )
    if training.exact or training.engine == "peft":
        return padded, None
    why = _by_options(spec) or _by_model(learner.model.get_base_model())
    if why is not None:
        return padded, why
    lean = LeanPass(learner.model, learner.precision, loss=loss, fuses=not divided)
    why = _fault(lean, spec, longest, checks)
    if why is None and not divided:
        why = _differs(lean, padded, spec, learner.precision, checks)
    return (lean, None) if why is None else (padded, why)


def _fault(lean: LeanPass, spec: JobSpec, longest: int, checks: CheckCache | None) -> str | None:
    """The result of `rows_together`, which takes eight passes, computed once for all jobs that adapt the base in the
    same way: ranks and scales are numbers like the weights, and any will do for the comparison."""
    if checks is None:
        return rows_together(lean, longest)
    return checks(
        f"rows behind each other: {_lengths(lean, longest)} {_how(lean, spec)}", lambda: rows_together(lean, longest)
    )


def _differs(
    lean: LeanPass, own: PaddedPass, spec: JobSpec, precision: Precision, checks: CheckCache | None
) -> str | None:
    """How the lean pass differs from peft's own here, found out before the base's first training on a kind of card."""
    packing = spec.training.packing

    def check() -> str | None:
        return difference(lean, own, precision, packing=packing)

    try:
        if checks is None:
            wrong = check()
        else:
            asked = f"{spec.task_type.value} {spec.preference.model_dump_json()} {packing} {' '.join(arithmetic())}"
            wrong = checks.decided(f"the lean pass beside peft's own: {asked} {_how(lean, spec)}", check)
    except NoRoomToCompare:
        return None  # the first batches are tried next, and made smaller; a later job compares the passes
    return None if wrong is None else f"on this device the lean pass does not compute what peft's own does: {wrong}"


def _how(lean: LeanPass, spec: JobSpec) -> str:
    """How a base is adapted, but for numbers."""
    return f"{lean.fuses} {spec.lora.model_dump_json(exclude={'r', 'lora_alpha', 'lora_dropout', 'init_from'})}"


def _by_options(spec: JobSpec) -> str | None:
    if spec.kind.padded is not None:
        return spec.kind.padded
    if spec.training.torch_compile:
        return "a compiled model needs rows of few lengths"
    if spec.training.neftune_noise_alpha is not None:
        return "NEFTune's noise is made for padded rows"
    return None


def _by_model(model: Any) -> str | None:
    if not type(model).__module__.startswith("transformers."):
        return "the model runs its own code"
    config = model.config.get_text_config()
    if kinds := set(getattr(config, "layer_types", None) or ()) - set(ROW_ATTENTION):
        return f"the model has layers of the kind {sorted(kinds)[0]}"
    if getattr(config, "output_router_logits", False):
        return "the model's loss has a part for its router, which counts tokens of whole rows"
    return None


def tolerance_on(device: torch.device) -> float:
    """How much rows together may differ there from each row alone."""
    return TOLERANCE if device.type == "cpu" else KERNELS


def rows_together(lean: LeanPass, longest: int, tolerance: float | None = None) -> str | None:
    """Compare concatenated rows with each row alone, using the model's own code. None if they are equal.

    If the job has rows longer than a layer's window, so is one of these. `tolerance`: None for that of the pass's
    device.
    """
    within = tolerance_on(lean.device) if tolerance is None else tolerance
    with evaluating(lean.model), torch.no_grad(), wide.narrow():
        rows = _some_rows(_lengths(lean, longest), lean.model.get_input_embeddings().weight.shape[0])
        try:
            together, apart = lean.last_logits(rows, COMPARED), lean.layout.tells_apart
            single = [lean.last_logits([row], COMPARED)[0] for row in rows]
            alone = [lean.last_logits_alone(row, COMPARED) for row in rows]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"the model's code does not take rows behind each other ({first_line(error)})"
        whole = lean.model(input_ids=torch.tensor([rows[0].input_ids], device=lean.device), use_cache=False)
        if not _alike(alone[0], whole.logits[0, -COMPARED:].float()):
            return "the model's logits are not made of its last hidden states alone"
        if not all(_alike(ours, theirs, within) for ours, theirs in zip(together, single, strict=True)):
            return "rows behind each other would see each other in this model"
        if not apart:  # where logits are large, a row in sight may move them less than rounding
            return "the model's attention is code of its own"
        if not all(_alike(ours, theirs, KERNELS) for ours, theirs in zip(single, alone, strict=True)):
            return "attention row by row is not this model's own"
    return None


def _lengths(lean: LeanPass, longest: int) -> tuple[int, int, int]:
    """The lengths of the compared rows."""
    window = getattr(lean.model.config.get_text_config(), "sliding_window", None) or longest
    return 9, window + 7 if window < longest else 5, 7


def _alike(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether half of a row's tokens have the same logits. In a mixture of experts rounding sends some tokens through
    other experts; a real fault shows in all tokens."""
    alike = (ours - theirs).abs().amax(-1) <= tolerance * theirs.abs().amax(-1)
    return bool(2 * alike.sum() >= len(alike))


def _some_rows(lengths: tuple[int, ...], vocabulary: int) -> list[TokenRow]:
    ids = [[(number * 31 + at * 7 + 1) % vocabulary for at in range(length)] for number, length in enumerate(lengths)]
    return [TokenRow(number=number, input_ids=row, labels=row) for number, row in enumerate(ids)]


WHOLE = 1e-3
"""Share by which loss and gradients may differ in fp32: two sound passes differ by 1e-5, and a card may be allowed to
multiply in TF32."""

LOSS, KIND, EACH = 0.03, 0.25, 0.5
"""Shares in 16 bit: of the loss, of the gradients of one kind of matrix over all layers, and of the norm of a single
one. In SmolLM2 two sound passes differ by 0.02, 0.10 and 0.14."""

TINY = 1e-3
"""Share of the largest gradient below which one is rounding: in a mixture an expert may see no token."""

SCALE = 2.0**10
"""Of the loss, exact in every format: without it fp16 would lose small gradients."""


class NoRoomToCompare(Exception):
    """There was no memory to compare: whether rows fit is found out before the first step, and what follows then."""


def difference(lean: LeanPass, own: PaddedPass, precision: Precision, *, packing: bool) -> str | None:
    """How loss or gradients of the lean pass differ from those of peft's own, or what the lean pass raises, with and
    without recomputation; None: by rounding alone. Raises NoRoomToCompare, and what peft's own pass raises."""
    model, before, was_training = lean.model, lean.loss, lean.model.training
    try:
        lean.loss, rows = _posed(before, packing=packing)
        own.loss = lean.loss
        with random_streams_kept(), undrawing(model.train()), trained_weights(model, _stirred(model)):
            expected = _learned(own, rows)
            for recomputes in (False, True):
                if (wrong := _wrong(lean, rows, expected, precision, recomputes=recomputes)) is not None:
                    return wrong
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        full = first_line(error)
    finally:
        lean.loss = own.loss = before
        model.train(was_training)
        model.zero_grad()
    release()  # outside the handler: the error's traceback holds the tensors
    raise NoRoomToCompare(full)


def _posed(loss: TokenLoss, *, packing: bool) -> tuple[TokenLoss, list[TokenRow]]:
    """A loss of the job's kind, which knows the rows, and rows of its kind that are learned in part."""
    texts = [_text(number, length) for number, length in enumerate((9, 5, 7))]
    if not isinstance(loss, BentLoss):
        return loss, [joined(texts[:2]), texts[2]] if packing else texts
    rows = [joined([texts[0], other]) for other in texts[1:]]  # a pair is one row with both answers
    posed = copy.copy(loss)
    if isinstance(loss, PairLoss) and loss.asked.learns_prompts:
        rows = [*with_prompts(rows)]
    posed.take(rows, [(-20.0, -21.0)] * len(rows))
    return posed, rows


def _text(number: int, length: int) -> TokenRow:
    ids = [1 + number * 31 + at * 7 for at in range(length)]
    return TokenRow(number=number, input_ids=ids, labels=[IGNORED] * 2 + ids[2:])


def _stirred(model: Any) -> list[torch.Tensor]:
    """The trained weights, but another B: where B is zero, A has no gradient."""
    weights = list[torch.Tensor]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = torch.Generator(parameter.device).manual_seed(len(weights))
            stirred = torch.empty_like(parameter.data).normal_(std=0.02, generator=drawn)
            weights.append(stirred if "lora_B" in name else parameter.data)
    return weights


def _wrong(
    lean: LeanPass, rows: list[TokenRow], expected: PassOutcome, precision: Precision, *, recomputes: bool
) -> str | None:
    try:
        found = _recomputed(lean, rows) if recomputes else _learned(lean, rows)
    except Exception as error:
        if is_out_of_memory(error) or _is_of_card(str(error)):
            raise
        return f"it fails ({first_line(error)})"
    whole = precision.base is torch.float32
    if not abs(found.loss - expected.loss) <= (WHOLE if whole else LOSS) * abs(expected.loss):
        return f"its loss is {found.loss:.4g}, not {expected.loss:.4g}"
    if missing := expected.gradients.keys() ^ found.gradients.keys():
        return f"it leaves other gradients ({min(missing)})"
    return _wrong_gradient(found.gradients, expected.gradients, whole=whole)


def _is_of_card(said: str) -> bool:
    """Whether the card itself failed. A wrong address is more likely a kernel's fault: it must be remembered, or no job
    would ever train there."""
    found = card_error(said)
    return found is not None and found[0] is Reason.GPU_ERROR and "illegal memory access" not in said


def _wrong_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, whole: bool) -> str | None:
    norms = {name: float(gradient.norm()) for name, gradient in expected.items() if gradient.dim() > 1}
    least = TINY * max(norms.values())
    kinds: dict[str, tuple[float, float]] = {}
    for name, norm in norms.items():
        apart, kind = float((found[name] - expected[name]).norm()), re.sub(r"\.\d+(?=\.)", "", name)
        before = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = before[0] + apart**2, before[1] + max(norm, least) ** 2
        off = apart if whole else abs(float(found[name].norm()) - norm)
        if not off <= (WHOLE if whole else EACH) * max(norm, least):
            return f"its gradient of {name} differs by {off / max(norm, least):.2g} of it"
    for kind, (apart, size) in kinds.items():
        if not apart**0.5 <= KIND * size**0.5:
            return f"its gradients of {kind} differ by {(apart / size) ** 0.5:.2g} of them"
    return None


@dataclass(frozen=True, kw_only=True)
class PassOutcome:
    """What a pass made of some rows."""

    loss: float
    gradients: dict[str, torch.Tensor]


def _learned(forward: LeanPass | PaddedPass, rows: list[TokenRow]) -> PassOutcome:
    (batch,) = window_of(forward.loss, [rows])
    forward.model.zero_grad()
    loss = forward.learn(batch, lambda share: (SCALE * share).backward())
    named = {name: parameter.grad for name, parameter in forward.model.named_parameters()}
    return PassOutcome(loss=float(loss), gradients={name: g for name, g in named.items() if g is not None})


def _recomputed(lean: LeanPass, rows: list[TokenRow]) -> PassOutcome:
    lean.recompute_blocks()
    try:
        return _learned(lean, rows)
    finally:
        lean.model.activation_checkpointing_disable()
