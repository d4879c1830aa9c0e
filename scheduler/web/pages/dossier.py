"""All that is known about one job, for its page, with the course of its loss by attempt and the steps repeated."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loractl.common.errors import LoractlError, SweepNotFound
from loractl.common.job.status import STOPPED, Reason, Status
from loractl.common.store.store import Store
from loractl.common.store.tables import Attempt, Event, MetricPoint
from loractl.common.text import in_words
from loractl.scheduler.compare.answer import flat_settings
from loractl.scheduler.status.job import JobHistory, JobState, PastAttempt, job_history, trouble_on
from loractl.scheduler.wait.cards import SILENT_S, silent_s
from loractl.scheduler.why.answer import Why, why

from .shelf import ReportDigest, ReportShelf, digest

LOG_CHUNKS, LOG_LINES = 3, 60
"""What the end of a log is made of."""

REPORT_WAIT_S = 1.5
"""How long a page waits for a report; the next page will have it."""


@dataclass(frozen=True, kw_only=True)
class JobDossier:
    """A job with all that is known about it."""

    history: JobHistory
    waits_from: dt.datetime
    course: JobCourse
    wait: Why | None  # of a waiting job
    trouble: str | None  # what is wrong with a running job's card, in a few words
    silent: bool  # a running job's card is silent, and nobody ordered that
    settings: Mapping[str, Any]  # of the resolved job file, by key
    varied: Collection[str]  # the settings that its sweep varies
    sweep_name: str | None
    report: ReportDigest | None
    report_missing: str | None  # why there is none though there should be one
    log_end: str
    followers: tuple[int, ...]  # the jobs that start after it, directly or not
    card_bytes: Mapping[int, int]  # bytes of the card of each attempt, if that card is still known

    @property
    def job(self) -> JobState:
        return self.history.job

    @property
    def told(self) -> tuple[Event, ...]:
        """The history, with consecutive checkpoints as one line (a long job saves hundreds), and each warning once:
        every attempt reads the data again."""
        runs = itertools.groupby(_warned_once(self.history.events), key=lambda e: (e.kind == "saved", e.attempt))
        return tuple(event for (saved, _), run in runs for event in (_as_one(list(run)) if saved else run))

    @property
    def reached(self) -> tuple[int | None, float | None]:
        """The last measured step and training loss. An attempt's start and a retry clear the job's own."""
        step, loss = self.course.last or (None, None)
        return step if self.job.step is None else self.job.step, loss if self.job.loss is None else self.job.loss

    def tone(self, event: Event) -> str:
        """good, bad, at (an attempt begins), or empty: nothing to look at, or a person's order."""
        attempt = next((a.row for a in self.history.attempts if a.row.attempt == event.attempt), None)
        if event.kind == "requeued" and attempt is not None and attempt.reason in STOPPED:
            return ""
        tones = {"succeeded": "good", "failed": "bad", "requeued": "bad", "closed": "bad", "started": "at"}
        return tones.get(event.kind, "")

    @property
    def trained_s(self) -> float:
        """Seconds of all attempts; a running one counts until now."""
        now = self.history.now
        return sum(((a.row.ended_at or now) - a.row.started_at).total_seconds() for a in self.history.attempts)

    @property
    def waited_s(self) -> float:
        """Seconds until the first start, or until now."""
        attempts, until = self.history.attempts, self.job.ended_at or self.history.now
        return max(0.0, ((attempts[0].row.started_at if attempts else until) - self.waits_from).total_seconds())


def job_dossier(store: Store, shelf: ReportShelf, job_id: int) -> JobDossier:
    """A job in full. Raises JobNotFound."""
    row = store.jobs.get(job_id)
    history = job_history(store, job_id)
    answer = why(store, job_id, in_other_forms=False) if row.status is Status.QUEUED else None
    view = store.cards.fleet() if row.status is Status.RUNNING else None
    known = {node.node: node.total for node in store.cards.nodes()}
    varied, sweep_name = _of_sweep(store, row.sweep_id)
    report, missing = _report(shelf, history.job, row.manifest_sha256)
    log_end = "".join(chunk.text for chunk in store.jobs.log_end(job_id, LOG_CHUNKS))
    return JobDossier(
        history=history,
        waits_from=row.waits_from,
        course=job_course(store, job_id, history.attempts),
        wait=answer if isinstance(answer, Why) else None,
        trouble=None if view is None else trouble_on(view, history.job.cards),
        silent=view is not None and any(silent_s(view, c) > SILENT_S for c in history.job.cards if c in view.nodes),
        settings=dict(flat_settings(history.spec)),
        varied=varied,
        sweep_name=sweep_name,
        report=report,
        report_missing=missing,
        log_end="\n".join(log_end.splitlines()[-LOG_LINES:]),
        followers=tuple(store.jobs.followers(job_id)),
        card_bytes={a.row.attempt: known[a.row.node] for a in history.attempts if a.row.node in known},
    )


def _warned_once(events: Sequence[Event]) -> list[Event]:
    """Each warning once, where it came last, and with its attempts if another attempt read the data without it."""
    holders: dict[str, list[int | None]] = {}
    for event in events:
        if event.kind == "warning" and event.attempt not in holders.setdefault(event.text, []):
            holders[event.text].append(event.attempt)
    readers = {event.attempt for event in events if event.kind in ("data", "warning")}
    once: list[Event] = []
    for event in reversed(events):
        attempts = holders.pop(event.text, []) if event.kind == "warning" else [event.attempt]
        if event.kind == "warning" and attempts and set(attempts) != readers:
            which = in_words([str(attempt) for attempt in attempts])
            once.append(_reworded(event, f"{event.text} (attempt{'s' if attempts[1:] else ''} {which})"))
        elif attempts:
            once.append(event)
    return once[::-1]


def _as_one(saved: list[Event]) -> list[Event]:
    if len(saved) < 3:
        return saved
    first, last = saved[0].text.rpartition(" ")[2], saved[-1].text.rpartition(" ")[2]
    return [_reworded(saved[-1], f"saved steps {first} to {last}, {len(saved)} checkpoints")]


def _reworded(event: Event, text: str) -> Event:
    return Event(at=event.at, attempt=event.attempt, kind=event.kind, text=text)


def _of_sweep(store: Store, sweep_id: int | None) -> tuple[Collection[str], str | None]:
    if sweep_id is None:
        return (), None
    try:
        head = store.sweeps.head(sweep_id)
    except SweepNotFound:
        return (), None
    return tuple(head.settings.get("varied") or ()), head.name


def _report(shelf: ReportShelf, job: JobState, stamp: str | None) -> tuple[ReportDigest | None, str | None]:
    if job.status is not Status.SUCCEEDED:
        return None, None
    try:
        content = shelf.report(job.job_id, stamp, wait_s=REPORT_WAIT_S)
        return (None, "it is still being read from the artifact store") if content is None else (digest(content), None)
    except LoractlError as error:
        return None, error.sentence


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
