"""The lean pass beside peft's own, on a micro-batch of a few short rows: before a box trusts it on a device that it has
not met. Weights, gradients and random numbers are as before."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch

from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import Precision, random_streams_kept, trained_weights, undrawing
from loractl.worker.base.gauge import is_out_of_memory, release
from loractl.worker.base.source import first_line
from loractl.worker.data.row_forms import with_prompts
from loractl.worker.data.tokens import IGNORED, TokenRow, joined
from loractl.worker.engine.loss import BentLoss, TokenLoss, window_of
from loractl.worker.engine.pairs import PairLoss
from loractl.worker.protocol.exit_reason import card_error

from .lean import LeanPass
from .padded import PaddedPass

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
