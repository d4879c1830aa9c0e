"""Which forward pass a job gets: the lean one if rows can be told apart without padding, and if it computes on this
device what peft's own does; else the padded one, which is peft's own."""

from __future__ import annotations

from typing import Any

import torch

from loractl.common.job.spec import JobSpec
from loractl.common.memory.families import ROW_ATTENTION
from loractl.worker.base.arithmetic import Precision, evaluating
from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.base.model import Learner
from loractl.worker.base.processor import arithmetic
from loractl.worker.base.source import first_line
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import UNSMOOTHED, Loss

from . import wide
from .check_cache import CheckCache
from .lean import LeanPass
from .padded import PaddedPass
from .trial import NoRoomToCompare, difference

TOLERANCE = 0.01
"""Share of the largest logit that rounding may move; another row in sight, or a scale left out, moves far more."""

KERNELS = 0.05
"""The same share between two kernels for the same numbers in 16 bit: a real model of 30 layers moves by more than 0.01.
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
            together, apart = lean.last_logits(rows, COMPARED), lean.tells_apart
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
