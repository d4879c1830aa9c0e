"""Every query of loractl: a verb a method, a transaction a verb.

Status changes are guarded updates: they name the state that they expect and, once a job runs, the token of the
attempt that may change it. Zero rows means that somebody else was there first.
"""

from __future__ import annotations

import datetime as dt
import importlib
import math
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    DateTime,
    Engine,
    Select,
    Update,
    bindparam,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from .errors import JobNotFound, WrongState
from .method import Method
from .policy import Need, choose_method, permitted_methods
from .records import Beat, Claim, NodeState, Progress, StoredResult, Submission
from .status import LAB_RETRY_DELAY_S, OUTCOMES, WORKER_LOST_LIMIT, Reason, Stage, Status, retry_delay_s
from .tables import Adapter, Attempt, Event, Job, LogChunk, MetricPoint, Node, UtcDateTime

if TYPE_CHECKING:
    from pydantic import ValidationError

Row = TypeVar("Row")

LEASE_S = 60.0
"""How long an attempt may be silent before its job goes on elsewhere, by the database's clock."""

NODE_STALE_S = 60.0
"""A node that was not seen for so long counts as offline."""


class Store:
    """The jobs' database. `clock` is for tests; without it leases follow the database's own clock."""

    def __init__(self, engine: Engine, clock: Callable[[], dt.datetime] | None = None) -> None:
        self._engine = engine
        self._clock = clock
        dialect = importlib.import_module(f"sqlalchemy.dialects.{engine.dialect.name}")
        self._upsert = dialect.insert  # both dialects' ON CONFLICT has the same form

    # --- what a person does ---

    def submit(self, submission: Submission) -> int:
        """Write a QUEUED job; its number is durable when this returns."""
        spec = submission.spec
        with self._write() as session:
            job = Job(
                name=spec.name,
                user=submission.user,
                labels=dict(spec.labels),
                spec=spec.model_dump(mode="json"),
                spec_hash=spec.spec_hash(),
                base_model=spec.base_model,
                data=submission.data,
                priority=spec.priority,
                vram_lora=submission.need.lora,
                vram_qlora=submission.need.qlora,
                vram_needed=submission.vram_needed,
                vram_class=submission.vram_class,
                max_retries=spec.max_retries,
                status=Status.QUEUED,
                submitted_at=self._now_value(session),
            )
            session.add(job)
            session.flush()
            self._event(session, job.job_id, None, "queued", f"queued by {submission.user}")
            return job.job_id

    def cancel(self, job_id: int, user: str) -> Job:
        """Cancel a waiting job now, or ask a running one's trainer to stop.

        Raises JobNotFound, WrongState when it has ended.
        """
        with self._write() as session:
            now = self._now_value(session)
            waiting = _change(job_id, Status.QUEUED).values(
                status=Status.CANCELLED, reason=Reason.CANCELLED, message=f"cancelled by {user}", ended_at=now
            )
            if not _rows(session, waiting):
                running = _change(job_id, Status.RUNNING).values(cancel_requested=True)
                if not _rows(session, running):
                    ended = self._get(session, job_id)
                    raise WrongState(f"job {job_id} has already {_ended_as(ended)}")
            job = self._get(session, job_id)
            kind = "cancelled" if job.status is Status.CANCELLED else "cancel"
            self._event(
                session, job_id, None, kind, f"{'cancelled' if kind == 'cancelled' else 'cancel asked for'} by {user}"
            )
            return job

    def retry(self, job_id: int, user: str) -> Job:
        """Queue a failed, cancelled or held job again, with all its retries. Raises JobNotFound, WrongState."""
        fresh = {
            "status": Status.QUEUED,
            "reason": None,
            "message": None,
            "stage": None,
            "cancel_requested": False,
            "held": False,
            "not_before": None,
            "retries_used": 0,
            "ended_at": None,
            "token": None,
            "lease_expires_at": None,
            "step": None,
            "total_steps": None,
            "loss": None,
            "tokens_per_second": None,
            "eta_seconds": None,
        }
        with self._write() as session:
            again = (
                update(Job)
                .where(Job.job_id == job_id)
                .where(or_(Job.status.in_([Status.FAILED, Status.CANCELLED]), (Job.status == Status.QUEUED) & Job.held))
                .values(**fresh)
            )
            if not _rows(session, again):
                job = self._get(session, job_id)
                raise WrongState(
                    f"job {job_id} is {job.status.value}: only a failed, cancelled or held job can be retried"
                )
            self._event(session, job_id, None, "retry", f"queued again by {user}")
            return self._get(session, job_id)

    # --- what a node does ---

    def claim(self, node: str, gpu: str, free: int, *, plan_holds: bool = True) -> Claim | None:
        """Take the first waiting job that fits into `free` bytes: a token and a lease, or None.

        `plan_holds` is false on a CPU: plans are for GPUs, so none is noted beside what is measured there.
        """
        from pydantic import ValidationError

        from .spec import JobSpec

        with self._write() as session:
            now = self._now_value(session)
            job = session.scalars(_waiting(now, free).limit(1).with_for_update(skip_locked=True)).first()
            if job is None:
                return None
            try:
                spec = JobSpec.model_validate(job.spec)
            except ValidationError as error:
                self._refuse(session, job, error, now)
                return None
            need = Need(lora=job.vram_lora, qlora=job.vram_qlora)
            limit = min(free, spec.resources.max_vram or free)
            # submit refuses a max_vram below every need; were there such a row, it must not block those behind it
            method = choose_method(spec.method, need, limit) or permitted_methods(spec.method)[-1]
            token, attempt = uuid.uuid4().hex, job.attempt + 1
            taken = _change(job.job_id, Status.QUEUED).values(
                status=Status.RUNNING,
                stage=Stage.PREPARING,
                token=token,
                attempt=attempt,
                node=node,
                gpu=gpu,
                method=method.value,
                lease_expires_at=self._now_in(LEASE_S),
                started_at=now,
                reason=None,
                message=None,
                step=None,
                total_steps=None,
                loss=None,
                tokens_per_second=None,
                eta_seconds=None,
                not_before=None,
            )
            if not _rows(session, taken):
                return None
            planned = need.of(method) if plan_holds else None
            session.add(
                Attempt(
                    job_id=job.job_id,
                    attempt=attempt,
                    token=token,
                    node=node,
                    gpu=gpu,
                    method=method.value,
                    vram_planned=planned,
                    vram_reserved=planned,
                    started_at=now,
                )
            )
            self._event(
                session,
                job.job_id,
                attempt,
                "started",
                f"attempt {attempt} started on {node} with {method.value}{_why_method(spec.method, method, planned)}",
            )
            return Claim(
                job_id=job.job_id,
                attempt=attempt,
                token=token,
                user=job.user,
                spec=spec,
                data=job.data,
                method=method,
                vram_planned=planned,
            )

    def beat(self, claim: Claim, progress: Progress) -> Beat:
        """Extend the lease and write what is new: progress, metrics, events, log lines."""
        values = {
            name: value
            for name in ("stage", "step", "total_steps", "loss", "tokens_per_second", "eta_seconds")
            if (value := getattr(progress, name)) is not None
        }
        values = {name: v for name, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        with self._write() as session:
            alive = (
                _mine(claim).values(lease_expires_at=self._now_in(LEASE_S), **values).returning(Job.cancel_requested)
            )
            row = session.execute(alive).first()
            if row is None:
                return Beat(accepted=False)
            self._record(session, claim, progress)
            return Beat(accepted=True, cancel_requested=row.cancel_requested)

    def finish(
        self, claim: Claim, reason: Reason, message: str, progress: Progress, result: StoredResult | None = None
    ) -> Status | None:
        """End the attempt; the job succeeds, fails, is cancelled, or waits for its next attempt.

        Returns the job's status afterwards, or None when the lease was lost: then nothing was written.
        """
        if (reason is Reason.OK) != (result is not None):
            raise ValueError("a result goes with reason ok, and only with it")
        with self._write() as session:
            now = self._now_value(session)
            job = session.scalars(select(Job).where(Job.job_id == claim.job_id).with_for_update()).one()
            if job.token != claim.token or job.status is not Status.RUNNING:
                return self._already_finished(session, claim, reason, job)
            self._record(session, claim, progress)  # first: what was told before the end stands before it
            self._end_attempt(session, job, reason, message, now)
            if result is not None:
                job.adapter_uri, job.report_uri = result.adapter_uri, result.report_uri
                session.add(
                    Adapter(
                        job_id=job.job_id,
                        attempt=claim.attempt,
                        name=job.name,
                        base_model=job.base_model,
                        method=claim.method.value,
                        uri=result.adapter_uri,
                        size=result.adapter_size,
                        sha256=result.adapter_sha256,
                        created_at=now,
                    )
                )
            return job.status

    def reap(self) -> list[tuple[int, int]]:
        """End every attempt whose lease is over as worker_lost; returns (job_id, vram_class) of what waits again."""
        requeued = []
        with self._write() as session:
            now = self._now_value(session)
            lost = select(Job).where(Job.status == Status.RUNNING, Job.lease_expires_at < now)
            for job in session.scalars(lost.with_for_update(skip_locked=True)):
                self._end_attempt(session, job, Reason.WORKER_LOST, f"{job.node} was silent for {LEASE_S:.0f} s", now)
                if job.status is Status.QUEUED and not job.held:
                    requeued.append((job.job_id, job.vram_class))
        return requeued

    def see_node(self, state: NodeState) -> None:
        """Write a device's row; its last sight is now."""
        with self._write() as session:
            row = {**vars(state), "seen_at": self._now_value(session)}
            statement = self._upsert(Node).values(**row)
            session.execute(
                statement.on_conflict_do_update(index_elements=["node"], set_={k: row[k] for k in row if k != "node"})
            )

    def forget_node(self, node: str) -> None:
        """Remove the row of a node that has stopped in order."""
        with self._write() as session:
            for row in session.scalars(select(Node).where(Node.node == node)):
                session.delete(row)

    def waiting_classes(self) -> dict[int, int]:
        """VRAM class -> number of jobs that could be claimed now."""
        with self._read() as session:
            ready = _ready(self._now_value(session))
            query = select(Job.vram_class, func.count()).where(*ready).group_by(Job.vram_class)
            return {row[0]: row[1] for row in session.execute(query)}

    def unfinished(self, largest: int) -> int:
        """Number of jobs that run, or wait and would fit into `largest` bytes; held ones are left out."""
        waiting = (Job.status == Status.QUEUED) & ~Job.held & or_(Job.vram_needed.is_(None), Job.vram_needed <= largest)
        with self._read() as session:
            query = select(func.count()).select_from(Job).where(or_(waiting, Job.status == Status.RUNNING))
            return session.scalar(query) or 0

    # --- what a person reads ---

    def now(self) -> dt.datetime:
        """The database's time, which every timestamp follows."""
        with self._read() as session:
            return self._now_value(session)

    def job(self, job_id: int) -> Job:
        """One job. Raises JobNotFound."""
        with self._read() as session:
            return self._get(session, job_id)

    def jobs(
        self,
        *,
        statuses: Sequence[Status] = (),
        user: str | None = None,
        label: tuple[str, str] | None = None,
        ended_since: dt.datetime | None = None,
        limit: int | None = None,
    ) -> list[Job]:
        """Jobs, newest first, that match every given filter."""
        query = select(Job).order_by(Job.job_id.desc())
        if statuses:
            query = query.where(Job.status.in_(statuses))
        if user:
            query = query.where(Job.user == user)
        if label:
            query = query.where(Job.labels[label[0]].as_string() == label[1])
        if ended_since:
            query = query.where(Job.ended_at >= ended_since)
        with self._read() as session:
            return list(session.scalars(query.limit(limit)))

    def attempts(self, job_id: int) -> list[Attempt]:
        return self._all(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt))

    def events(self, job_id: int) -> list[Event]:
        return self._all(select(Event).where(Event.job_id == job_id).order_by(Event.event_id))

    def metrics(self, job_id: int, name: str) -> list[MetricPoint]:
        """The points of one metric, by attempt and step."""
        found = select(MetricPoint).where(MetricPoint.job_id == job_id, MetricPoint.name == name)
        return self._all(found.order_by(MetricPoint.attempt, MetricPoint.step))

    def log(self, job_id: int, after: int = 0) -> list[LogChunk]:
        """Log chunks of all attempts with a chunk_id above `after`."""
        found = select(LogChunk).where(LogChunk.job_id == job_id, LogChunk.chunk_id > after)
        return self._all(found.order_by(LogChunk.chunk_id))

    def nodes(self) -> list[Node]:
        return self._all(select(Node).order_by(Node.node))

    def adapters(self) -> list[Adapter]:
        return self._all(select(Adapter).order_by(Adapter.job_id))

    # --- inside ---

    def _write(self) -> _Transaction:
        return _Transaction(self._engine, read_only=False)

    def _read(self) -> _Transaction:
        return _Transaction(self._engine, read_only=True)

    def _all(self, query: Select[Row]) -> list[Row]:
        with self._read() as session:
            return list(session.scalars(query))

    def _get(self, session: Session, job_id: int) -> Job:
        job = session.get(Job, job_id, populate_existing=True)
        if job is None:
            raise JobNotFound(job_id)
        return job

    def _now_in(self, seconds: float) -> ColumnElement[dt.datetime]:
        """The time `seconds` from now, by the injected clock, PostgreSQL's, or (one machine) the system's."""
        if self._clock is None and self._engine.dialect.name == "postgresql":
            return func.clock_timestamp(type_=DateTime(timezone=True)) + dt.timedelta(seconds=seconds)
        now = self._clock() if self._clock else dt.datetime.now(dt.UTC)
        return bindparam(None, now + dt.timedelta(seconds=seconds), type_=UtcDateTime(), unique=True)

    def _now_value(self, session: Session) -> dt.datetime:
        if self._clock is None and self._engine.dialect.name == "postgresql":
            now: dt.datetime = session.execute(select(func.clock_timestamp())).scalar_one()
            return now.astimezone(dt.UTC)
        return self._clock() if self._clock else dt.datetime.now(dt.UTC)

    def _event(self, session: Session, job_id: int, attempt: int | None, kind: str, text: str) -> None:
        session.add(Event(job_id=job_id, attempt=attempt, at=self._now_value(session), kind=kind, text=_storable(text)))

    def _refuse(self, session: Session, job: Job, error: ValidationError, now: dt.datetime) -> None:
        """Fail a job whose spec this version can't read, so that it does not stop the jobs behind it."""
        first = error.errors()[0]
        what = f"this worker's loractl does not understand {'.'.join(map(str, first['loc']))}: {first['msg']}"
        job.status, job.reason, job.message, job.ended_at = Status.FAILED, Reason.BAD_SPEC, what, now
        self._event(session, job.job_id, None, job.status.value, what)

    def _record(self, session: Session, claim: Claim, progress: Progress) -> None:
        """Write the append-only part of a heartbeat; the caller has checked the token in this transaction."""
        points = [
            {"job_id": claim.job_id, "attempt": claim.attempt, "step": step, "name": name, "value": value}
            for step, name, value in progress.metrics
            if math.isfinite(value)  # SQLite keeps a NaN as null
        ]
        if points:
            # A row a statement: one statement for all has more parameters than a database takes after an outage.
            session.execute(self._upsert(MetricPoint).on_conflict_do_nothing(), points)
        for kind, text in progress.events:
            self._event(session, claim.job_id, claim.attempt, kind, text)
        if progress.log:
            session.execute(
                insert(LogChunk).values(
                    job_id=claim.job_id,
                    attempt=claim.attempt,
                    at=self._now_value(session),
                    text=_storable(progress.log),
                )
            )
        measured = {
            name: value for name in ("vram_peak", "resumed_from_step") if (value := getattr(progress, name)) is not None
        }
        if measured:
            session.execute(
                update(Attempt)
                .where(Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt)
                .values(**measured)
            )

    def _end_attempt(self, session: Session, job: Job, reason: Reason, message: str, now: dt.datetime) -> None:
        """Close the running attempt and decide what becomes of the job."""
        message = _storable(message)
        session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.job_id, Attempt.attempt == job.attempt)
            .values(ended_at=now, reason=reason, message=message)
        )
        outcome = OUTCOMES[reason]
        job.token = job.lease_expires_at = job.stage = job.eta_seconds = None
        job.reason, job.message = reason, message
        again = (
            outcome.retryable
            and not job.cancel_requested
            and (not outcome.counts or job.retries_used < job.max_retries)
        )
        if not again:
            job.status = Status.CANCELLED if job.cancel_requested and reason is not Reason.OK else outcome.status
            job.reason = Reason.CANCELLED if job.status is Status.CANCELLED else reason
            job.ended_at = now
            self._event(session, job.job_id, job.attempt, job.status.value, message)
            return
        job.status = Status.QUEUED
        text = f"attempt {job.attempt} ended ({reason.value}): {message}"
        if outcome.counts:
            job.retries_used += 1
            delay = retry_delay_s(job.retries_used)
            job.not_before = now + dt.timedelta(seconds=delay)
            text += f"; tried again in {delay:.0f} s, retry {job.retries_used} of {job.max_retries}"
        elif reason in (Reason.WORKER_LOST, Reason.GPU_ERROR):
            if self._times_ended(session, job.job_id, reason) >= WORKER_LOST_LIMIT:
                job.held = True
                what = "its worker was lost" if reason is Reason.WORKER_LOST else "its card failed"
                job.message = f"held: {what} {WORKER_LOST_LIMIT} times; it may be what kills them"
                text += "; held, loractl retry releases it"
            elif reason is Reason.GPU_ERROR:
                job.not_before = now + dt.timedelta(seconds=LAB_RETRY_DELAY_S)
        self._event(session, job.job_id, job.attempt, "held" if job.held else "requeued", text)

    def _times_ended(self, session: Session, job_id: int, reason: Reason) -> int:
        """Attempts that ended so since a person last queued the job again."""
        retried = select(func.max(Event.at)).where(Event.job_id == job_id, Event.kind == "retry").scalar_subquery()
        lost = (
            select(func.count())
            .select_from(Attempt)
            .where(Attempt.job_id == job_id, Attempt.reason == reason)
            .where(or_(retried.is_(None), Attempt.started_at >= retried))
        )
        return session.scalar(lost) or 0

    def _already_finished(self, session: Session, claim: Claim, reason: Reason, job: Job) -> Status | None:
        """A commit whose answer was lost may have been our own: then the attempt's row says so."""
        attempt = session.get(Attempt, (claim.job_id, claim.attempt))
        own = attempt is not None and attempt.token == claim.token and attempt.reason is reason
        return job.status if own else None


class _Transaction:
    """One session, one transaction: committed at the end, rolled back on an error; rows stay readable afterwards."""

    def __init__(self, engine: Engine, *, read_only: bool) -> None:
        self._session = Session(engine.execution_options(read_only=read_only), expire_on_commit=False)

    def __enter__(self) -> Session:
        return self._session

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._session.commit()
        finally:
            self._session.close()


def _rows(session: Session, statement: Update) -> int:
    """How many rows the update changed."""
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast(CursorResult[Any], result).rowcount


def _storable(text: str) -> str:
    """The text without what PostgreSQL or UTF-8 can't hold: zero bytes and lone surrogates."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _change(job_id: int, expected: Status) -> Update:
    return update(Job).where(Job.job_id == job_id, Job.status == expected)


def _mine(claim: Claim) -> Update:
    """The guard of every write of an attempt."""
    return _change(claim.job_id, Status.RUNNING).where(Job.token == claim.token)


def _ready(now: dt.datetime) -> tuple[ColumnElement[bool], ...]:
    """What makes a job claimable, whatever it needs."""
    return (
        Job.status == Status.QUEUED,
        ~Job.held,
        ~Job.cancel_requested,
        or_(Job.not_before.is_(None), Job.not_before <= now),
    )


def _waiting(now: dt.datetime, free: int) -> Select[Job]:
    fits = or_(Job.vram_needed.is_(None), Job.vram_needed <= free)
    return select(Job).where(*_ready(now), fits).order_by(Job.priority.desc(), Job.job_id)


def _why_method(wanted: Method, taken: Method, planned: int | None) -> str:
    """Why auto took this method, for the history."""
    if wanted is not Method.AUTO:
        return ""
    if taken is Method.QLORA:
        return " (auto: lora does not fit)"
    return " (auto: it fits)" if planned is not None else " (auto: lora unless a plan says that it does not fit)"


def _ended_as(job: Job) -> str:
    return {Status.SUCCEEDED: "succeeded", Status.FAILED: "failed"}.get(job.status, "been cancelled")
