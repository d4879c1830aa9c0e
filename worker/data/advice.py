"""What to set for a job's data: the max_length that cuts nothing, and the micro-batch that a card holds with it."""

from __future__ import annotations

from loractl.common.job.method import permitted_methods
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import largest_fit
from loractl.common.memory.step import Lengths
from loractl.common.units import gib

from .check import Checked


def advice_for(spec: JobSpec, checked: Checked, room: int | None) -> list[str]:
    """Sentences for a person. `room`: bytes of the card to recommend for."""
    if checked.lengths is None:
        return []
    longest = max(checked.lengths.most, checked.longest_held_out)
    length = -(-longest // 64) * 64
    advice = [f"dataset.max_length: {length} holds the longest row, {longest} tokens."]
    fit = _largest_batch(spec, length, longest, checked, room) if room else None
    return [*advice, fit] if fit else advice


def _largest_batch(spec: JobSpec, length: int, longest: int, checked: Checked, room: int) -> str | None:
    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        return None
    wide = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_length": length})})
    labels = len(checked.labels) or None
    rows = checked.train_rows + checked.left_out  # at this length all of them are used
    halves = spec.kind.halves  # the plan is for whole rows
    held_out = halves * checked.longest_held_out
    lengths = Lengths(train=halves * longest, evaluate=held_out, rows=rows, labels=labels)
    effective = spec.training.effective_batch
    for method in permitted_methods(spec.method):
        most = largest_fit(shape, wide, method, room, lengths).micro_batch
        if most:
            size = spec.training.micro_batch(most)
            return (
                f"In {gib(room)} GiB {method.value} takes up to {most} such rows at once; with the same {effective} "
                f"a step: per_device_train_batch_size: {size}, gradient_accumulation_steps: {effective // size}."
            )
    return f"Not one row of {longest} tokens fits into {gib(room)} GiB by the plan."
