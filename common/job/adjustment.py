"""How a run is made to fit its memory: the same effective batch in smaller pieces, and blocks that are recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .method import Checkpointing, RoomyForm

if TYPE_CHECKING:
    from .spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What the memory of a run has changed in a job; None leaves what its spec says."""

    micro_batch: int | None = None  # per_device_train_batch_size
    accumulation: int | None = None  # gradient_accumulation_steps
    gradient_checkpointing: Checkpointing | None = None  # False or half, though the spec leaves it open: it has room
    eval_batch: int | None = None  # per_device_eval_batch_size

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def read(cls, column: Mapping[str, Any] | None) -> Adjustment:
        """What `as_json` has written; what only a newer version changes is left out."""
        return cls(**{key.name: column.get(key.name) for key in fields(cls)} if column else {})


def adjusted(spec: JobSpec, adjustment: Adjustment) -> JobSpec:
    """The job as it runs."""
    training = {
        "per_device_train_batch_size": adjustment.micro_batch,
        "gradient_accumulation_steps": adjustment.accumulation,
        "gradient_checkpointing": adjustment.gradient_checkpointing,
    }
    evaluation = {"per_device_eval_batch_size": adjustment.eval_batch}

    def known(changes: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in changes.items() if value is not None}

    return spec.model_copy(
        update={
            "training": spec.training.model_copy(update=known(training)),
            "evaluation": spec.evaluation.model_copy(update=known(evaluation)),
        }
    )


def is_roomy(spec: JobSpec, adjustment: Adjustment) -> bool:
    """Whether the placement has given an attempt the room to recompute nothing, or only every second block."""
    return spec.training.gradient_checkpointing is None and adjustment.gradient_checkpointing in (False, "half")


def in_its_room(spec: JobSpec, adjustment: Adjustment, form: RoomyForm) -> Adjustment:
    """The job in that form, with the same effective batch."""
    roomy, rows = replace(adjustment, gradient_checkpointing="half" if form.half else False), form.micro_batch
    if rows == spec.training.per_device_train_batch_size:
        return roomy
    return replace(roomy, micro_batch=rows, accumulation=spec.training.effective_batch // rows)


def without_room(spec: JobSpec, adjustment: Adjustment) -> Adjustment:
    """The adjustment without its room, which was only for one attempt."""
    if not is_roomy(spec, adjustment):
        return adjustment
    return replace(adjustment, micro_batch=None, accumulation=None, gradient_checkpointing=None)


def next_adjustment(spec: JobSpec, adjustment: Adjustment, *, on_gpu: bool, cards: int = 1) -> Adjustment | None:
    """The next step down after out-of-memory; None when only another method or a larger card can help.

    Half the micro-batch of a card (the largest divisor of the effective batch up to half) with the accumulation that
    keeps the effective batch, down to one row; then gradient checkpointing, which is on from the start on a GPU unless
    the job refuses it. A run with room to recompute less first recomputes all, in its own micro-batches.
    `cards`: how many share the job.
    """
    if is_roomy(spec, adjustment):
        return replace(without_room(spec, adjustment), gradient_checkpointing=True)
    training = adjusted(spec, adjustment).training
    batch, _ = training.rows_a_card(cards)
    if batch > 1:
        smaller = training.micro_batch(batch // 2)
        return replace(adjustment, micro_batch=smaller, accumulation=training.effective_batch // smaller)
    checkpointing = on_gpu if training.gradient_checkpointing is None else training.gradient_checkpointing
    return None if checkpointing is True else replace(adjustment, gradient_checkpointing=True)


def in_words(
    spec: JobSpec,
    before: Adjustment,
    after: Adjustment,
    *,
    where: str = "",
    then: str = "continues",
    cards: int = 1,
) -> str:
    """The line of the job's history for one step down: what did not fit (and `where`), and how the run continues."""
    old, new = adjusted(spec, before), adjusted(spec, after)
    where = f" {where}" if where else ""
    if new.evaluation != old.evaluation:
        sizes = old.evaluation.per_device_eval_batch_size, new.evaluation.per_device_eval_batch_size
        return f"out of memory{where} evaluating {_rows(sizes[0])} at once: evaluates {sizes[1]}"
    (batch, _), (smaller, pieces) = old.training.rows_a_card(cards), new.training.rows_a_card(cards)
    checkpointing = "gradient checkpointing"
    if old.training.gradient_checkpointing == "half":
        checkpointing += " of every block"
    how = f"{smaller}, accumulating {pieces} (same effective batch)" if smaller != batch else checkpointing
    if is_roomy(spec, before) and smaller != batch:
        how = f"{checkpointing} and {how}"
    each = f" on each of {cards} cards" if cards > 1 else ""
    return f"out of memory{where} with {_rows(batch)} at once{each}: {then} with {how}"


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
