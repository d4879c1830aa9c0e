"""One job: its public state, its course, its whole history, and its log."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.store.fleet import FleetView
from loractl.common.store.store import Store
from loractl.common.store.tables import Attempt, AttemptShare, Event, Job
from loractl.common.text import in_short, in_words
from loractl.scheduler.wait.cards import trouble_of
from loractl.scheduler.wait.queue import waiting_jobs
from loractl.scheduler.wait.reasons import Wait

JSON_FIELDS = (
    "job_id", "name", "user", "status", "reason", "message", "stage", "method", "base_model", "step", "total_steps",
    "loss", "eta_seconds", "node", "gpu", "attempt", "submitted_at", "started_at", "ended_at", "adapter_uri",
    "report_uri", "labels", "sweep_id", "cards", "after", "awaits",
)  # fmt: skip
"""What --json says about a job: the table's columns, and where it runs."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job."""

    job_id: int
    name: str
    user: str
    status: Status
    reason: Reason | None  # how it ended, or its last attempt
    message: str | None  # why, in one sentence
    stage: Stage | None  # of a running job
    method: str | None
    base_model: str
    step: int | None
    total_steps: int | None
    loss: float | None  # the last logged
    eta_seconds: float | None  # until its end, as of the last beat
    node: str | None
    gpu: str | None
    attempt: int  # 0: none has started
    submitted_at: dt.datetime
    started_at: dt.datetime | None
    ended_at: dt.datetime | None
    adapter_uri: str | None
    report_uri: str | None
    labels: Mapping[str, str]
    sweep_id: int | None  # the sweep that it belongs to
    awaits: int | None  # the first unfinished job among those it starts after

    # shown to people, not in the JSON
    priority: int
    held: bool  # by a person or the lab, not by a job that it starts after
    cancel_requested: bool
    preempted_by: int | None  # the job that a running one gives way to
    tokens_per_second: float | None
    vram_needed: int | None  # bytes; None: not known yet
    has_checkpoint: bool  # in the artifact store, to continue from
    eta_spread_seconds: float | None  # half width of the range in which it ends
    evaluated: int | None  # rows and answers of base and tuned together, while it evaluates
    to_evaluate: int | None

    cards: tuple[str, ...] = ()  # on which it runs, its first card first; none while it does not run
    after: tuple[int, ...] = ()  # the jobs that it starts after

    @property
    def where(self) -> str:
        """The cards on which it runs, in words."""
        return in_words(self.cards or (self.node or "",))

    @property
    def place(self) -> str:
        """The cards on which it runs, as short as possible."""
        return in_short(self.cards or (self.node or "–",))

    @property
    def gave_way(self) -> str:
        """For which job it stopped and waits now, as a sentence; empty: for none."""
        if self.status is not Status.QUEUED or self.reason is not Reason.PREEMPTED:
            return ""
        return f"It {self.message}; it goes on from its checkpoint"

    @property
    def share(self) -> float | None:
        """How much of its stage is done, 0 to 1: of its evaluation while it evaluates, else of its steps."""
        if self.stage is Stage.EVALUATING:
            return None if self.evaluated is None or not self.to_evaluate else self.evaluated / self.to_evaluate
        return self.step / self.total_steps if self.step is not None and self.total_steps else None

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names, and where it runs and what it starts after: `cards` (its first card first,
        empty while it does not run) and `after`. `message`: of a waiting job in a list, what it waits for."""
        return {name: _plain(getattr(self, name)) for name in JSON_FIELDS}


_STATE_FIELDS = tuple(JobState.__annotations__)[:-2]


def state_of(job: Job, view: FleetView | None = None) -> JobState:
    """The public part of a row. Without `view` only a running job's first card is known."""
    state = JobState(**{name: getattr(job, name) for name in _STATE_FIELDS}, after=tuple(job.after))
    if job.status is not Status.RUNNING or job.node is None:
        return state
    others = set() if view is None else set(view.cards_of(job.job_id)) - {job.node}
    return replace(state, cards=(job.node, *sorted(others)))


def job_state(store: Store, job_id: int) -> JobState:
    """The state of a job. Raises JobNotFound."""
    job = store.jobs.get(job_id)
    state = state_of(job)
    others = [share.node for share in store.attempts.shares(job_id) if share.attempt == job.attempt and share.rank > 0]
    return replace(state, cards=(*state.cards, *others)) if state.cards else state


@dataclass(frozen=True, kw_only=True)
class CardPart:
    """An attempt's share of one of its cards, in bytes."""

    node: str
    reserved: int | None
    used: int | None  # measured now; None: not running, or not measured yet


@dataclass(frozen=True, kw_only=True)
class PastAttempt:
    """One run of a job, on one card or on several."""

    COLUMNS = (
        "job_id", "attempt", "node", "gpu", "method", "vram_planned", "vram_reserved", "vram_peak", "vram_allocated",
        "vram_process", "device_name", "device_kind", "started_at", "ended_at", "reason", "message",
        "resumed_from_step", "roomy",
    )  # fmt: skip

    row: Attempt

    cards: tuple[CardPart, ...] = ()  # all of them, its first card first; several have equal plans

    @property
    def place(self) -> str:
        """Its cards, as short as possible."""
        return in_short([part.node for part in self.cards] or [self.row.node])

    @property
    def how(self) -> str:
        """Its method, and whether it began without recomputing."""
        return f"{self.row.method}, roomy" if self.row.roomy else self.row.method

    @property
    def planned(self) -> int | None:
        """Bytes of the plan; with several cards, of each."""
        return self.row.vram_reserved if len(self.cards) > 1 else self.row.vram_planned

    @property
    def peak(self) -> int | None:
        """The measured peak in bytes; with several cards, of the fullest."""
        return self.row.vram_process or self.row.vram_peak

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names: columns, and `cards` with `node`, `reserved` and `used` of each."""
        return {**self.row.as_json(*self.COLUMNS), "cards": [vars(part) for part in self.cards]}


@dataclass(frozen=True, kw_only=True)
class JobHistory:
    """A job with its whole history, and its resolved spec."""

    job: JobState
    spec: Mapping[str, Any]
    data: Mapping[str, Any]  # stored data sets: {"path": {"uri", "sha256"}, "eval_path": ...}
    attempts: tuple[PastAttempt, ...]
    events: tuple[Event, ...]
    now: dt.datetime

    @property
    def had_several(self) -> bool:
        """Whether an attempt had several cards."""
        return any(len(attempt.cards) > 1 for attempt in self.attempts)

    def as_json(self) -> dict[str, Any]:
        """The job's fields; its resolved `spec`; `data`: the stored data sets by key, each with `uri`, `sha256`,
        `rows`, `bytes` and `tokens`; `attempts`, the oldest first; `events`, each with `at`, `attempt` (null: of none),
        `kind` and `text`."""
        return {
            **self.job.as_json(),
            "spec": dict(self.spec),
            "data": dict(self.data),
            "attempts": [attempt.as_json() for attempt in self.attempts],
            "events": [event.as_json("at", "attempt", "kind", "text") for event in self.events],
        }


def job_history(store: Store, job_id: int) -> JobHistory:
    """A job's whole history. Raises JobNotFound."""
    row = store.jobs.get(job_id)
    return _history(store, row, store.cards.fleet() if row.status is Status.RUNNING else None)


@dataclass(frozen=True, kw_only=True)
class JobInFull(JobHistory):
    """A job with its history, why it waits, and its course so far."""

    wait: Wait | None  # of a waiting job
    losses: tuple[tuple[int, float], ...]  # step, logged training loss
    held_out: tuple[tuple[int, float], ...]  # step, loss on held-out rows
    trouble: str | None = None  # what is wrong with a running job's card, in a few words
    after: tuple[JobState, ...] = ()  # the jobs that it starts after, as far as they exist
    followers: tuple[int, ...] = ()  # the jobs that start after it, directly or not


def job_in_full(store: Store, job_id: int) -> JobInFull:
    """A job, its history, why it waits, and its course. Raises JobNotFound."""
    row = store.jobs.get(job_id)
    view = store.cards.fleet() if row.status in (Status.QUEUED, Status.RUNNING) else None
    past = _history(store, row, view)
    return JobInFull(
        **vars(past),
        wait=waiting_jobs(store, [row], view).reasons.get(job_id),
        trouble=None if view is None else trouble_on(view, past.job.cards),
        losses=tuple((point.step, point.value) for point in store.jobs.metrics(job_id, "loss")),
        held_out=held_out_losses(store, job_id),
        after=tuple(map(state_of, store.jobs.numbered(past.job.after).values())),
        followers=tuple(store.jobs.followers(job_id)),
    )


def _history(store: Store, row: Job, view: FleetView | None) -> JobHistory:
    job = state_of(row, view)
    return JobHistory(
        job=job,
        spec=row.spec,
        data=row.data,
        attempts=_attempts(store, job, view),
        events=tuple(store.jobs.events(job.job_id)),
        now=store.now(),
    )


def trouble_on(view: FleetView, cards: Sequence[str]) -> str | None:
    """What is wrong with a running job's card, in a few words; with several cards, its name too. None: nothing."""
    for card in cards:
        if card in view.nodes and (said := trouble_of(view, card)) is not None:
            return f"{said} ({card})" if len(cards) > 1 else said
    return None


def held_out_losses(store: Store, job_id: int) -> tuple[tuple[int, float], ...]:
    """Step and held-out loss of each evaluation in mid-training so far."""
    return tuple((point.step, point.value) for point in store.jobs.metrics(job_id, "eval_loss"))


def _attempts(store: Store, job: JobState, view: FleetView | None) -> tuple[PastAttempt, ...]:
    shares = store.attempts.shares(job.job_id)
    known = [] if view is None else [view.nodes[card] for card in job.cards if card in view.nodes]
    used = {node.node: node.used.get(str(job.job_id)) for node in known}

    def told(row: Attempt) -> PastAttempt:
        mine = [share for share in shares if share.attempt == row.attempt]
        return attempt_of(row, mine, used if row.ended_at is None else None)

    return tuple(map(told, store.attempts.of_job(job.job_id)))


def attempt_of(row: Attempt, shares: Sequence[AttemptShare] = (), used: Mapping[str, Any] | None = None) -> PastAttempt:
    """The public part of an attempt. `shares`: of its cards, by rank, if it has several; `used`: bytes measured now, by
    card."""
    held: list[tuple[str, int | None]] = [(share.node, share.bytes) for share in shares]
    held = held or [(row.node, row.vram_reserved)]
    cards = tuple(CardPart(node=node, reserved=size, used=(used or {}).get(node)) for node, size in held)
    return PastAttempt(row=row, cards=cards)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.datetime) else list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class JobLog:
    """The log of a job, or what is new since an earlier read."""

    job: JobState
    text: str
    last: int  # the last chunk of the database in it; 0: none

    @property
    def removed(self) -> bool:
        """Whether it was stored with a result that has been removed."""
        return self.job.status == "succeeded" and self.job.report_uri is None


def job_log(store: Store, open_artifacts: Callable[[], ArtifactStore], job_id: int) -> JobLog:
    """The whole log of all attempts; the store is opened if needed. Raises JobNotFound, ArtifactError."""
    job, chunks = store.jobs.get(job_id), store.jobs.log(job_id)
    stored = _stored(store, open_artifacts, job, {chunk.attempt for chunk in chunks})
    text = "".join(chunk.text for chunk in chunks) + stored
    return JobLog(job=state_of(job), text=text, last=chunks[-1].chunk_id if chunks else 0)


def log_since(store: Store, log: JobLog) -> JobLog:
    """What a job has logged since an earlier read. The job is read first, so that nothing is missed at its end."""
    job = store.jobs.get(log.job.job_id)
    chunks = store.jobs.log(job.job_id, after=log.last)
    text = "".join(chunk.text for chunk in chunks)
    return JobLog(job=state_of(job), text=text, last=chunks[-1].chunk_id if chunks else log.last)


def _stored(store: Store, open_artifacts: Callable[[], ArtifactStore], job: Job, listed: set[int]) -> str:
    """The log stored with a result, if loractl gc has removed its lines from the database."""
    if job.report_uri is None or job.attempt in listed:
        return ""
    from loractl.common.binding import result_binding

    return open_artifacts().read_bytes(result_binding(store, job), "log.txt").decode(errors="replace")
