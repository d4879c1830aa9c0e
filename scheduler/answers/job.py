"""One job: what everyone may see of it, its course, and its whole history."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.job.status import Reason, Stage, Status

from .wait.cards import trouble_of
from .wait.queue import waiting_jobs
from .wait.reasons import Wait

if TYPE_CHECKING:
    from loractl.common.store.fleet import FleetView
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Attempt, Event, Job

JSON_FIELDS = (
    "job_id", "name", "user", "status", "reason", "message", "stage", "method", "base_model", "step", "total_steps",
    "loss", "eta_seconds", "node", "gpu", "attempt", "submitted_at", "started_at", "ended_at", "adapter_uri",
    "report_uri", "labels", "sweep_id",
)  # fmt: skip
"""What --json says about a job; the same names as the table's columns."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Where a job stands."""

    job_id: int
    name: str
    user: str
    status: Status
    reason: Reason | None  # how it ended, or its last attempt
    message: str | None  # why, in one sentence
    stage: Stage | None  # of a running one
    method: str | None
    base_model: str
    step: int | None
    total_steps: int | None
    loss: float | None  # the last logged one
    eta_seconds: float | None  # until it ends, as of the last beat
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

    # shown to people, not in the JSON
    priority: int
    held: bool
    cancel_requested: bool
    tokens_per_second: float | None
    vram_needed: int | None  # bytes; None: not known yet
    has_checkpoint: bool  # in the artifact store, to go on from
    eta_spread_seconds: float | None  # half width of the range in which it ends
    evaluated: int | None  # rows and answers of base and tuned together, while it evaluates
    to_evaluate: int | None

    @property
    def share(self) -> float | None:
        """How much of its stage is done, of 1: of its evaluation while it evaluates, else of its steps."""
        if self.stage is Stage.EVALUATING:
            return None if self.evaluated is None or not self.to_evaluate else self.evaluated / self.to_evaluate
        return self.step / self.total_steps if self.step is not None and self.total_steps else None

    def as_json(self) -> dict[str, Any]:
        """JSON_FIELDS, with times as ISO 8601; a status, a stage and a reason by its word."""
        return {name: _plain(getattr(self, name)) for name in JSON_FIELDS}


_STATE_FIELDS = tuple(JobState.__annotations__)


def state_of(job: Job) -> JobState:
    """What everyone may see of a row."""
    return JobState(**{name: getattr(job, name) for name in _STATE_FIELDS})


def job_state(store: Store, job_id: int) -> JobState:
    """Where a job stands. Raises JobNotFound."""
    return state_of(store.job(job_id))


@dataclass(frozen=True, kw_only=True)
class PastEvent:
    """One line of a job's history."""

    at: dt.datetime
    attempt: int | None
    kind: str
    text: str

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return {**vars(self), "at": self.at.isoformat()}


@dataclass(frozen=True, kw_only=True)
class PastAttempt:
    """One run of a job on one device."""

    job_id: int
    attempt: int
    node: str
    gpu: str
    method: str
    vram_planned: int | None  # bytes
    vram_reserved: int | None
    vram_peak: int | None  # reserved by CUDA's allocator; on a CPU the process's resident set
    vram_allocated: int | None  # of it, by tensors
    vram_process: int | None  # of the device, by the whole process, context included
    device_name: str | None
    device_kind: str | None
    started_at: dt.datetime
    ended_at: dt.datetime | None
    reason: Reason | None
    message: str | None
    resumed_from_step: int | None

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names: all columns but the secret token."""
        return {name: _plain(value) for name, value in vars(self).items()}


_ATTEMPT_FIELDS = tuple(PastAttempt.__annotations__)


@dataclass(frozen=True, kw_only=True)
class JobInFull:
    """A job with its course so far."""

    job: JobState
    wait: Wait | None  # of one that waits
    attempts: tuple[PastAttempt, ...]
    events: tuple[PastEvent, ...]
    losses: tuple[tuple[int, float], ...]  # step, logged training loss
    held_out: tuple[tuple[int, float], ...]  # step, loss on held-out rows
    now: dt.datetime
    trouble: str | None = None  # what is wrong with the card of a running one, in a few words
    companions: tuple[int, ...] = ()  # other jobs that train in its trainer

    def as_json(self) -> dict[str, Any]:
        """The job's fields; `loractl show` has the history."""
        return self.job.as_json()


def job_in_full(store: Store, job_id: int) -> JobInFull:
    """A job, why it waits, and its course. Raises JobNotFound."""
    row = store.job(job_id)
    view = store.fleet() if row.status in (Status.QUEUED, Status.RUNNING) else None
    runs = row.status is Status.RUNNING and view is not None and row.node in view.nodes
    return JobInFull(
        job=state_of(row),
        wait=waiting_jobs(store, [row], view).reasons.get(job_id),
        trouble=trouble_of(view, row.node) if runs and view is not None and row.node is not None else None,
        companions=companions_of(view, row),
        attempts=_attempts(store, job_id),
        events=_events(store, job_id),
        losses=tuple((point.step, point.value) for point in store.metrics(job_id, "loss")),
        held_out=held_out_losses(store, job_id),
        now=store.now(),
    )


def companions_of(view: FleetView | None, row: Job) -> tuple[int, ...]:
    """The other jobs in a running job's trainer, as far as the view has its card."""
    card = None if view is None or row.status is not Status.RUNNING else view.cards.get(row.node or "")
    return () if card is None else card.companions(row.job_id)


def held_out_losses(store: Store, job_id: int) -> tuple[tuple[int, float], ...]:
    """Step and loss on held-out rows, of each evaluation in mid-training so far."""
    return tuple((point.step, point.value) for point in store.metrics(job_id, "eval_loss"))


@dataclass(frozen=True, kw_only=True)
class JobHistory:
    """A job with its whole past, and its resolved spec."""

    job: JobState
    spec: Mapping[str, Any]
    data: Mapping[str, Any]  # stored data sets: {"path": {"uri", "sha256"}, "eval_path": ...}
    attempts: tuple[PastAttempt, ...]
    events: tuple[PastEvent, ...]
    now: dt.datetime

    def as_json(self) -> dict[str, Any]:
        """The job's fields, `spec`, `data`, `attempts` and `events`."""
        return {
            **self.job.as_json(),
            "spec": dict(self.spec),
            "data": dict(self.data),
            "attempts": [attempt.as_json() for attempt in self.attempts],
            "events": [event.as_json() for event in self.events],
        }


def job_history(store: Store, job_id: int) -> JobHistory:
    """A job's whole past. Raises JobNotFound."""
    row = store.job(job_id)
    return JobHistory(
        job=state_of(row),
        spec=_mapping(row.spec),
        data=_mapping(row.data),
        attempts=_attempts(store, job_id),
        events=_events(store, job_id),
        now=store.now(),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    """A column's object; an empty one for a row that has none there, which nobody's submit has written."""
    return value if isinstance(value, dict) else {}


def _attempts(store: Store, job_id: int) -> tuple[PastAttempt, ...]:
    return tuple(map(attempt_of, store.attempts(job_id)))


def _events(store: Store, job_id: int) -> tuple[PastEvent, ...]:
    return tuple(map(event_of, store.events(job_id)))


def attempt_of(row: Attempt) -> PastAttempt:
    """What everyone may see of an attempt."""
    return PastAttempt(**{name: getattr(row, name) for name in _ATTEMPT_FIELDS})


def event_of(row: Event) -> PastEvent:
    """A line of the history."""
    return PastEvent(at=row.at, attempt=row.attempt, kind=row.kind, text=row.text)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.datetime) else value
