"""The course of a job's loss: its attempts one after the other, and the steps that a later one repeated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loractl.common.job.status import STOPPED, Reason

if TYPE_CHECKING:
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Attempt, MetricPoint
    from loractl.scheduler.status.job import PastAttempt

MOST_POINTS = 600
"""Points of a line on a job's page: more than a screen can show."""


@dataclass(frozen=True, kw_only=True)
class AttemptSpan:
    """The steps that an attempt took."""

    attempt: int
    place: str  # its cards, as short as possible
    first: int
    last: int
    repeated: int  # steps at its end that the next attempt took again
    tone: Literal["good", "bad", "on", ""]  # on: it runs; empty: somebody stopped it


@dataclass(frozen=True, kw_only=True)
class JobCourse:
    """The losses of a job over its steps. Thinned if there are very many."""

    runs: tuple[tuple[tuple[int, float], ...], ...]  # step and training loss, by attempt
    held_out: tuple[tuple[int, float], ...]
    spans: tuple[AttemptSpan, ...]

    @property
    def last(self) -> tuple[int, float] | None:
        """The last step whose training loss was logged, and that loss."""
        return self.runs[-1][-1] if self.runs else None

    @property
    def repeated_steps(self) -> int:
        return sum(span.repeated for span in self.spans)


def job_course(store: Store, job_id: int, attempts: Sequence[PastAttempt]) -> JobCourse:
    """The course so far."""
    points = store.jobs.thinned([job_id], "loss", MOST_POINTS)
    by_attempt = {number: list(run) for number, run in itertools.groupby(points, lambda point: point.attempt)}
    held_out = {point.step: point.value for point in store.jobs.thinned([job_id], "eval_loss", MOST_POINTS)}
    return JobCourse(
        runs=tuple(tuple((p.step, p.value) for p in run) for run in by_attempt.values()),
        held_out=tuple(sorted(held_out.items())),
        spans=tuple(_spans(by_attempt, attempts)),
    )


def _spans(by_attempt: dict[int, list[MetricPoint]], attempts: Sequence[PastAttempt]) -> list[AttemptSpan]:
    trained = [attempt for attempt in attempts if attempt.row.attempt in by_attempt]
    spans = []
    for this, following in itertools.zip_longest(trained, trained[1:]):
        run = by_attempt[this.row.attempt]
        again = run[-1].step if following is None else (following.row.resumed_from_step or 0)
        spans.append(
            AttemptSpan(
                attempt=this.row.attempt,
                place=this.place,
                first=this.row.resumed_from_step or 0,
                last=run[-1].step,
                repeated=max(0, run[-1].step - again),
                tone=_tone(this.row),
            )
        )
    return spans


def _tone(attempt: Attempt) -> Literal["good", "bad", "on", ""]:
    if attempt.ended_at is None:
        return "on"
    return "good" if attempt.reason is Reason.OK else "" if attempt.reason in STOPPED else "bad"
