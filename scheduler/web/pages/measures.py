"""What a report says, as values that a page can rely on: a worker wrote it, and may have been someone else's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loractl.common.chart import forest
from loractl.common.errors import ArtifactError
from loractl.common.verdict import RIGHT, Written, answer_groups, rights, word, written

UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What a malformed report raises when its parts are read."""


@dataclass(frozen=True, kw_only=True)
class ReportedChange:
    """One metric of a report: base against tuned."""

    name: str
    label: str
    unit: str
    cases: int
    higher_is_better: bool
    shown: Written
    low: float | None  # ends of the interval and its middle on an axis of 0..100, the base at 50
    change: float
    high: float | None

    @property
    def tone(self) -> str:
        """better, worse, or same."""
        return self.shown.reading if self.shown.reading in ("better", "worse") else "same"


@dataclass(frozen=True, kw_only=True)
class AnswerGroup:
    """The answers to held-out rows that changed in one way."""

    key: str
    title: str
    answers: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class ReportDigest:
    """A report as a page shows it."""

    reading: str
    sentence: str
    aside: str
    warnings: tuple[str, ...]  # of the data
    rows: int
    samples: int
    seed: int
    changes: tuple[ReportedChange, ...]
    harness: tuple[ReportedChange, ...]  # of the lm-eval harness
    groups: tuple[AnswerGroup, ...]

    @property
    def word(self) -> str:
        """The verdict's word, as `status` and the report have it."""
        return word(self.reading)

    @property
    def tone(self) -> str:
        """better, worse, or same."""
        return self.reading if self.reading in ("better", "worse") else "same"

    @property
    def main(self) -> ReportedChange:
        """The held-out loss."""
        return next((change for change in self.changes if change.name == "loss"), self.changes[0])


def digest(report: Mapping[str, Any]) -> ReportDigest:
    """The parts of a report that a page shows. Raises ArtifactError for a malformed report."""
    try:
        return _digest(report)
    except UNREADABLE as error:
        raise ArtifactError(f"its report has another form than loractl's ({type(error).__name__})") from error


def _digest(report: Mapping[str, Any]) -> ReportDigest:
    evaluation, verdict = report["evaluation"], report["verdict"]
    return ReportDigest(
        reading=str(verdict["reading"]),
        sentence=str(verdict["sentence"]),
        aside=str(verdict.get("aside") or ""),
        warnings=tuple(map(str, (report.get("data") or {}).get("warnings") or ())),
        rows=int(evaluation["rows"]),
        samples=int(evaluation["bootstrap"]["samples"]),
        seed=int(evaluation["bootstrap"]["seed"]),
        changes=_changes(evaluation["metrics"]),
        harness=_changes([{**m, "name": m["label"]} for m in (evaluation.get("lm_eval") or {}).get("metrics", ())]),
        groups=tuple(
            AnswerGroup(key=key, title=title, answers=tuple(map(_answer, answers)))
            for key, title, answers in answer_groups(evaluation["answers"])
        ),
    )


def _changes(metrics: list[dict[str, Any]]) -> tuple[ReportedChange, ...]:
    places = forest(metrics)
    return tuple(
        ReportedChange(
            name=str(m["name"]),
            label=str(m["label"]),
            unit=str(m.get("unit") or ""),
            cases=int(m["cases"]),
            higher_is_better=bool(m["higher_is_better"]),
            shown=written({"unit": "", **m}),
            low=None if m["low"] is None else _inside(places[m["name"]]["low"]),
            change=_inside(places[m["name"]]["change"]),
            high=None if m["high"] is None else _inside(places[m["name"]]["high"]),
        )
        for m in metrics
    )


def _inside(place: float) -> float:
    return round(min(100.0, max(0.0, float(place))), 1)


def _answer(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    texts = {key: str(answer[key]) for key in ("prompt", "expected", "base", "tuned")}
    ended = {key: bool(answer[key]) for key in ("base_ended", "tuned_ended")}
    rejected = None if answer.get("rejected") is None else str(answer["rejected"])
    said = {key: RIGHT[found] for key, found in zip(("base", "tuned"), rights(answer), strict=True)}
    return {"row": int(answer["row"]), **texts, **ended, "said": said, "rejected": rejected}
