"""Whether two finished jobs came out the same: their weights bit for bit, their losses, and what they ran with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.store.store import Store
from loractl.scheduler.compare.answer import (
    FinishedJob,
    Report,
    base_hash,
    check_one_task,
    differences,
    finished_job,
    held_out_hash,
    train_rows_hash,
)

_TOLD_BY_THE_RUN = (
    "method", "revision", "training.dtype", "training.optim", "training.gradient_checkpointing", "dataset.path",
    "dataset.more", "dataset.eval_path", "dataset.final_path", "evaluation.regression",
)  # fmt: skip
"""Settings that a repetition fixes to the values taken. Both runs' reports have them under `_RAN_WITH`."""


def _company(report: Report) -> str:
    """The jobs that trained in the same process, as earlier versions let them. They could change digits: a matrix
    library may round a row differently, depending on how many rows it multiplies at once."""
    return ", ".join(map(str, report["training"].get("companions") or ())) or "none"


_RAN_WITH: dict[str, Callable[[Report], Any]] = {
    "method": lambda report: report["method"],
    "base model": base_hash,
    "training rows": train_rows_hash,
    "held-out rows": held_out_hash,
    "final rows": lambda report: report["data"].get("final_sha256"),
    "device": lambda report: report["job"]["device_name"],
    "threads": lambda report: report["training"]["threads"] if report["training"]["device"] == "cpu" else None,
    "other jobs in its trainer": _company,
    "number format": lambda report: report["training"]["precision"],
    "optimizer": lambda report: report["training"]["optim"],
    "rows at once": lambda report: report["training"]["per_device_train_batch_size"],
    "accumulation": lambda report: report["training"]["gradient_accumulation_steps"],
    "checkpointing": lambda report: report["training"]["gradient_checkpointing"],
    "evaluated at once": lambda report: report["training"]["per_device_eval_batch_size"],
    "steps": lambda report: report["training"]["steps"],
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One thing that both jobs have, and whether it is the same."""

    what: str
    first: Any
    second: Any

    @property
    def same(self) -> bool:
        return bool(self.first == self.second)

    @property
    def difference(self) -> float | None:
        """The second minus the first; None for values that are not numbers."""
        numbers = isinstance(self.first, (int, float)) and isinstance(self.second, (int, float))
        return self.second - self.first if numbers else None

    def as_json(self) -> dict[str, Any]:
        """`what`, `first`, `second`, `same` and `difference` (null for values that are not numbers)."""
        return {**vars(self), "same": self.same, "difference": self.difference}


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """The summed losses of the tuned model on the held-out rows, in nats, to a millionth."""

    rows: int  # in both jobs
    equal: int
    largest: float | None  # difference of a row; None if a loss is not finite
    row: int | None  # that row; None if all are equal


@dataclass(frozen=True, kw_only=True)
class Sameness:
    """Whether two jobs came out the same, by their reports."""

    first: int  # job numbers
    second: int
    weights: Pair
    losses: tuple[Pair, ...]
    row_losses: RowLosses | None  # None: measured on other rows
    parted_at: int | None  # the first step with a different logged training loss
    ran_with: tuple[Pair, ...]  # only what differs

    @property
    def same(self) -> bool:
        """Whether the weights, and the losses measured with them, are the same."""
        rows = self.row_losses is not None and self.row_losses.equal == self.row_losses.rows
        return self.weights.same and rows and all(loss.same for loss in self.losses)

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON values.

        `jobs`: both numbers; `same`; `adapter_sha256` and each of `losses` and `ran_with`: a pair (see Pair);
        `row_losses`: see RowLosses, null if other rows were measured; `parted_at_step`: null if the training losses are
        equal.
        """
        return {
            "jobs": [self.first, self.second],
            "same": self.same,
            "adapter_sha256": self.weights.as_json(),
            "losses": [pair.as_json() for pair in self.losses],
            "row_losses": None if self.row_losses is None else vars(self.row_losses),
            "parted_at_step": self.parted_at,
            "ran_with": [pair.as_json() for pair in self.ran_with],
        }


def sameness(store: Store, artifacts: ArtifactStore, first: int, second: int) -> Sameness:
    """Compare two finished jobs. Raises JobNotFound, WrongState for one without a result, and what compare_results
    raises."""
    return compare_results(finished_job(store, artifacts, first), finished_job(store, artifacts, second))


def compare_results(first: FinishedJob, second: FinishedJob) -> Sameness:
    """Compare two finished jobs by their reports and settings. Raises UsageError for jobs of different tasks."""
    check_one_task([first, second])
    mine, theirs = first.report, second.report
    ran_with = (*_ran_with(mine, theirs), *_settings(first, second))
    return Sameness(
        first=first.job_id,
        second=second.job_id,
        weights=Pair(what="adapter sha256", first=mine["adapter"]["sha256"], second=theirs["adapter"]["sha256"]),
        losses=tuple(_losses(mine, theirs)),
        row_losses=_row_losses(mine, theirs),
        parted_at=_parted_at(mine["training"]["losses"], theirs["training"]["losses"]),
        ran_with=tuple(pair for pair in ran_with if not pair.same),
    )


def _losses(first: Report, second: Report) -> Iterator[Pair]:
    logged = [report["training"]["losses"] for report in (first, second)]
    if all(logged):
        yield Pair(what="last training loss", first=logged[0][-1][1], second=logged[1][-1][1])
    theirs = {metric["name"]: metric for metric in second["evaluation"]["metrics"]}
    for mine in first["evaluation"]["metrics"]:
        other = theirs.get(mine["name"], {})
        for which in ("base", "tuned"):
            yield Pair(what=f"{mine['label']}, {which}", first=mine[which], second=other.get(which))


def _row_losses(first: Report, second: Report) -> RowLosses | None:
    mine, theirs = first["evaluation"]["row_losses"], second["evaluation"]["row_losses"]
    rows = [[(row, tokens) for row, tokens, *_ in losses] for losses in (mine, theirs)]
    if held_out_hash(first) != held_out_hash(second) or rows[0] != rows[1]:
        return None
    apart = {a[0]: _distance(a[3], b[3]) for a, b in zip(mine, theirs, strict=True) if a[3] != b[3]}
    row = max(apart, key=lambda row: apart[row], default=None)
    largest = apart[row] if row is not None else 0.0
    return RowLosses(
        rows=len(mine), equal=len(mine) - len(apart), largest=largest if math.isfinite(largest) else None, row=row
    )


def _distance(first: float | None, second: float | None) -> float:
    """Infinite if one of the two was not finite; JSON shows that as null."""
    return math.inf if first is None or second is None else abs(second - first)


def _parted_at(first: list[list[Any]], second: list[list[Any]]) -> int | None:
    for mine, theirs in itertools.zip_longest(first, second):
        if mine != theirs:
            return int((mine or theirs)[0])
    return None


def _ran_with(first: Report, second: Report) -> Iterator[Pair]:
    for what, read in _RAN_WITH.items():
        yield Pair(what=what, first=_read(read, first), second=_read(read, second))
    for name in dict.fromkeys((*first["versions"], *second["versions"])):
        yield Pair(what=name, first=first["versions"].get(name), second=second["versions"].get(name))


def _settings(first: FinishedJob, second: FinishedJob) -> Iterator[Pair]:
    from loractl.common.job.identity import UNDECIDING

    for key, (mine, theirs) in differences([first, second]).items():
        if UNDECIDING.isdisjoint((key, key.partition(".")[0])) and key not in _TOLD_BY_THE_RUN:
            yield Pair(what=key, first=mine, second=theirs)


def _read(read: Callable[[Report], Any], report: Report) -> Any:
    """None for a value that an earlier version's report does not have."""
    try:
        return read(report)
    except KeyError:
        return None
