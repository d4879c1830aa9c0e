"""Whether two finished jobs came out the same: their weights bit for bit, their losses, and what they ran with."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loractl.common.text import clean_line, minus
from loractl.scheduler.commands.compare import Compared, differences
from loractl.scheduler.text.screen import Screen, table

Report = dict[str, Any]

_APART = ("preemptible", "resources", "max_retries", "lora_patience")
_TOLD_BY_THE_RUN = (
    "method", "revision", "training.dtype", "training.optim", "dataset.path", "dataset.eval_path",
    "evaluation.regression",
)  # fmt: skip
"""Settings that a repetition fixes to what was taken: of both runs the report says it under `_RAN_WITH`."""

_RAN_WITH: dict[str, Callable[[Report], Any]] = {
    "method": lambda report: report["method"],
    "base model": lambda report: report["base"]["sha256"],
    "training rows": lambda report: report["data"]["train_rows_sha256"],
    "held-out rows": lambda report: report["data"]["held_out_sha256"],
    "device": lambda report: report["job"]["device_name"],
    "threads": lambda report: report["training"]["threads"] if report["training"]["device"] == "cpu" else None,
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
        """The second minus the first; None for what is no number."""
        numbers = isinstance(self.first, (int, float)) and isinstance(self.second, (int, float))
        return self.second - self.first if numbers else None


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """The summed losses of the tuned model on the held-out rows, in nats, to a millionth."""

    rows: int  # that both have
    equal: int
    largest: float | None  # difference of a row; None where a loss is not finite
    row: int | None  # which one that is; None where all are equal


@dataclass(frozen=True, kw_only=True)
class Sameness:
    """What the reports of two jobs say of their sameness."""

    first: int  # job numbers
    second: int
    weights: Pair
    losses: tuple[Pair, ...]
    row_losses: RowLosses | None  # None: measured on other rows
    parted_at: int | None  # the first step whose logged training loss differs
    ran_with: tuple[Pair, ...]  # only what differs

    @property
    def same(self) -> bool:
        """The same weights, and the same measured on them."""
        rows = self.row_losses is not None and self.row_losses.equal == self.row_losses.rows
        return self.weights.same and rows and all(loss.same for loss in self.losses)

    def as_json(self) -> dict[str, Any]:
        def fields(pair: Pair) -> dict[str, Any]:
            return {**vars(pair), "same": pair.same, "difference": pair.difference}

        return {
            "jobs": [self.first, self.second],
            "same": self.same,
            "adapter_sha256": fields(self.weights),
            "losses": [fields(pair) for pair in self.losses],
            "row_losses": None if self.row_losses is None else vars(self.row_losses),
            "parted_at_step": self.parted_at,
            "ran_with": [fields(pair) for pair in self.ran_with],
        }


def compare_results(first: Compared, second: Compared) -> Sameness:
    """Compare two finished jobs by their reports and settings."""
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


def sameness_text(found: Sameness, screen: Screen) -> str:
    """The verdict in a sentence; where it is no, by how much, from which step on, and what was not the same before."""
    if found.same:
        rows = found.row_losses.rows if found.row_losses else 0
        return (
            f"{found.second} came out the same as {found.first}: the adapters are equal bit for bit "
            f"(sha256 {found.weights.first[:12]}), and so are the losses on {rows} held-out rows."
        )
    numbers = [str(found.first), str(found.second)]
    apart = [found.weights, *(loss for loss in found.losses if not loss.same)]
    measured = [[p.what, _shown(p.first), _shown(p.second), _shift(p)] for p in apart]
    but = ": the adapters are equal, what was measured on them is not" if found.weights.same else ""
    lines = [
        f"{found.second} did not come out the same as {found.first}{but}.",
        "",
        *table(["MEASURED", *numbers, "DIFFERENCE"], measured, screen),
        "",
        f"{len(found.losses) + 1 - len(apart)} of {len(found.losses)} numbers are equal. "
        + _rows_sentence(found.row_losses),
    ]
    if found.parted_at is not None:
        lines.append(f"The training losses part at step {found.parted_at}.")
    if not found.ran_with:
        return "\n".join([*lines, "Nothing that the reports tell of the two runs differs."])
    ran_with = [[pair.what, _shown(pair.first), _shown(pair.second)] for pair in found.ran_with]
    return "\n".join([*lines, "", *table(["RAN WITH", *numbers], ran_with, screen)])


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
    if first["data"]["held_out_sha256"] != second["data"]["held_out_sha256"] or rows[0] != rows[1]:
        return None
    apart = {a[0]: _distance(a[3], b[3]) for a, b in zip(mine, theirs, strict=True) if a[3] != b[3]}
    row = max(apart, key=lambda row: apart[row], default=None)
    largest = apart[row] if row is not None else 0.0
    return RowLosses(
        rows=len(mine), equal=len(mine) - len(apart), largest=largest if math.isfinite(largest) else None, row=row
    )


def _distance(first: float | None, second: float | None) -> float:
    """Infinite where one of the two was not finite, which JSON has as null."""
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


def _settings(first: Compared, second: Compared) -> Iterator[Pair]:
    for key, (mine, theirs) in differences([first, second]).items():
        if key.partition(".")[0] not in _APART and key not in _TOLD_BY_THE_RUN:
            yield Pair(what=key, first=mine, second=theirs)


def _read(read: Callable[[Report], Any], report: Report) -> Any:
    """None for what a report of an earlier version does not say."""
    try:
        return read(report)
    except KeyError:
        return None


def _rows_sentence(losses: RowLosses | None) -> str:
    if losses is None:
        return "They were measured on other held-out rows."
    if losses.row is None:
        return f"The losses of all {losses.rows} held-out rows are equal."
    largest = "not finite" if losses.largest is None else f"{losses.largest:.2g} nats"
    return (
        f"Of {losses.rows} held-out rows {losses.equal} have equal losses; the largest difference is {largest}, "
        f"of row {losses.row}."
    )


def _shown(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = clean_line(value if isinstance(value, str) else json.dumps(value))
    return text[:12] if len(text) == 64 else text[:40]  # a hash by its beginning


def _shift(pair: Pair) -> str:
    if pair.same:
        return "equal"
    return "other" if pair.difference is None else minus(f"{pair.difference:+.2g}")
