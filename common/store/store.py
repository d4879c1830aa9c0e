"""Every query of loractl: a verb a method, a transaction a verb.

Status changes are guarded updates: they name the state that they expect and, once a job runs, the token of the
attempt that may change it. Zero rows means that somebody else was there first.
"""

from __future__ import annotations

import datetime as dt
import importlib
import math
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    DateTime,
    Engine,
    Select,
    Update,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy import text as sql
from sqlalchemy.orm import Session

from loractl import __version__
from loractl.common.errors import JobNotFound, SweepNotFound, WrongState
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Method
from loractl.common.job.need import Need, least_need, permitted_methods, within
from loractl.common.job.status import (
    LAB_RETRY_DELAY_S,
    OUTCOMES,
    WORKER_LOST_LIMIT,
    Reason,
    Stage,
    Status,
    retry_delay_s,
)
from loractl.common.memory.correction import GROWTH, Measured
from loractl.common.placement.cards import Card, could_start
from loractl.common.placement.keys import queue_key
from loractl.common.placement.lines import Openings, Waiting
from loractl.common.placement.preemption import give_way
from loractl.common.placement.rule import Placement, place
from loractl.common.placement.shares import decayed
from loractl.common.placement.sizes import vram_class
from loractl.common.settings import LEASE_S
from loractl.common.text import storable
from loractl.common.units import GIB, gib

from .adapters import Reference, drop_tag, find_adapter, read_tags, set_tag
from .fleet import (
    OCCUPANT,
    FleetView,
    card_of,
    drained_targets,
    read_cards,
    read_charges,
    read_levels,
    read_oldest,
    read_view,
    waiting_of,
)
from .records import Beat, Claim, Left, NodeState, Progress, StoredCheckpoint, StoredResult, Submission
from .retention import ENDED, Over, SpentLog, beyond_newest, drop_result, read_needed_data, read_over, spent_logs
from .sweeps import NewSweep, SweepView, read_rungs, read_sweeps, read_verdict, rung_points
from .tables import Adapter, Attempt, DrainOrder, Event, Job, LogChunk, MetricPoint, Node, Sweep, Use, UtcDateTime

if TYPE_CHECKING:
    from pydantic import ValidationError

    from loractl.common.job.spec import JobSpec

Row = TypeVar("Row")

NEWER_WORKER_DELAY_S = 60.0
"""A job that only a newer worker can read is looked at again after so long."""

_ETA = ("eta_seconds", "eta_spread_seconds")

OUTSIDER_SHARE = 0.85
"""An attempt that ran out of memory below this share of its reservation met somebody else's memory, not its own."""


class Store:
    """The jobs' database. `clock` is for tests; without it leases follow the database's own clock.

    `lease_s`: how long an attempt that this store claims or beats for may be silent.
    """

    def __init__(
        self, engine: Engine, clock: Callable[[], dt.datetime] | None = None, lease_s: float = LEASE_S
    ) -> None:
        self._engine = engine
        self._lease_s = lease_s
        self._clock = clock
        dialect = importlib.import_module(f"sqlalchemy.dialects.{engine.dialect.name}")
        self._upsert = dialect.insert  # both dialects' ON CONFLICT has the same form

    # --- what a person does ---

    def submit(self, submission: Submission) -> int:
        """Write a QUEUED job; its number is durable when this returns."""
        with self._write() as session:
            return self._queue(session, submission, self._now_value(session))

    def submit_sweep(self, sweep: NewSweep, members: Sequence[Submission]) -> int:
        """Write all members of a sweep as QUEUED jobs, or none; returns the sweep's number."""
        with self._write() as session:
            now = self._now_value(session)
            settings = {"varied": dict(sweep.varied), "trials": sweep.trials, "seed": sweep.seed}
            rungs = None if sweep.rungs is None else list(sweep.rungs)
            row = Sweep(name=sweep.name, user=sweep.user, settings=settings, rungs=rungs, created_at=now)
            session.add(row)
            session.flush()
            for member in members:
                self._queue(session, member, now, row.sweep_id)
            return row.sweep_id

    def cancel(self, job_id: int, user: str) -> Job:
        """Cancel a waiting job now, or ask a running one's trainer to stop.

        Raises JobNotFound, WrongState when it has ended.
        """
        with self._write() as session:
            return self._cancel(session, job_id, user)

    def cancel_sweep(self, sweep_id: int, user: str) -> list[Job]:
        """Cancel all members of a sweep that have not ended. Raises SweepNotFound, WrongState when all have."""
        with self._write() as session:
            left = select(Job.job_id).where(Job.sweep_id == sweep_id, Job.status.in_([Status.QUEUED, Status.RUNNING]))
            found = session.scalars(left.order_by(Job.job_id).with_for_update()).all()
            if not found and session.get(Sweep, sweep_id) is None:
                raise SweepNotFound(sweep_id)
            if not found:
                raise WrongState(f"all jobs of sweep {sweep_id} have ended")
            return [self._cancel(session, job_id, user) for job_id in found]

    def retry(self, job_id: int, user: str) -> Job:
        """Queue a failed, cancelled or held job again, with all its retries. Raises JobNotFound, WrongState."""
        fresh = {
            "status": Status.QUEUED,
            "reason": None,
            "message": None,
            "stage": None,
            "cancel_requested": False,
            "preempted_by": None,
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

    def claim(
        self,
        node: str,
        outside: int | None = None,
        used: Mapping[str, int] | None = None,
        distrusted: frozenset[str] = frozenset(),
    ) -> Claim | Left | None:
        """Take the job that the placement rule gives this card: a token, a lease and a part of its memory.

        `outside`, `used`: what the device shows at this moment (bytes held by others; bytes by job), when that is newer
        than the node's row. `distrusted`: nodes that did not take what was left to them; the rule goes without them.
        Left: the rule gives every job that fits here to other cards; without nodes, look again at once. None: nothing
        fits.
        """
        from pydantic import ValidationError

        from loractl.common.job.spec import JobSpec

        with self._write() as session:
            # Two slots of one card must not both reserve the same bytes.
            row = session.scalars(select(Node).where(Node.node == node).with_for_update()).first()
            if row is None:
                return None
            now = self._now_value(session)  # with the lock: a start stands after the end that made room for it
            cards = [replace(c, max_jobs=0) if c.node in distrusted - {node} else c for c in read_cards(session, now)]
            mine = next(card for card in cards if card.node == node)
            if outside is not None:
                live = tuple(replace(job, used=(used or {}).get(str(job.job_id), job.used)) for job in mine.running)
                mine = replace(mine, outside=max(mine.outside, outside), running=live)
                cards = [mine if card.node == node else card for card in cards]
            if not mine.open or not mine.slots or not mine.free:
                return None
            charges, oldest = read_charges(session, now), read_oldest(session, now)
            left: set[str] = set()
            for decision in place(read_levels(session, now), cards, charges, now, oldest):
                placed = decision.placed
                if placed is None:
                    continue
                if placed.node != node:
                    if could_start(placed.job, mine, cards):
                        left.add(placed.node)
                    continue
                job = session.get(Job, placed.job.job_id, with_for_update={"skip_locked": True}, populate_existing=True)
                if job is None or job.status is not Status.QUEUED:
                    return Left(nodes=frozenset())  # another node's claim was faster
                try:
                    spec = JobSpec.model_validate(job.spec)
                except ValidationError as error:
                    self._refuse(session, job, error, now)
                    return Left(nodes=frozenset())
                return self._start(session, job, spec, placed, row, now)
            return Left(nodes=frozenset(left)) if left else None

    def _start(
        self, session: Session, job: Job, spec: JobSpec, placed: Placement, node: Node, now: dt.datetime
    ) -> Claim:
        token, attempt, method = uuid.uuid4().hex, job.attempt + 1, placed.method
        taken = _change(job.job_id, Status.QUEUED).values(
            status=Status.RUNNING,
            stage=Stage.PREPARING,
            token=token,
            attempt=attempt,
            node=node.node,
            gpu=node.gpu,
            method=method.value,
            vram_reserved=placed.reserved,
            lease_expires_at=self._now_in(self._lease_s),
            started_at=now,
            reason=None,
            message=None,
            step=None,
            total_steps=None,
            loss=None,
            tokens_per_second=None,
            eta_seconds=None,
            eta_spread_seconds=None,
            not_before=None,
        )
        if not _rows(session, taken):
            raise AssertionError(f"job {job.job_id} was locked and yet changed")
        # Plans are for GPUs: on a processor none is noted beside what is measured there.
        planned = None if node.kind == "cpu" else job.planned.get(method.value)
        session.add(
            Attempt(
                job_id=job.job_id,
                attempt=attempt,
                token=token,
                node=node.node,
                gpu=node.gpu,
                device_name=node.device_name,
                device_kind=node.kind,
                method=method.value,
                vram_planned=planned,
                vram_reserved=placed.reserved,
                started_at=now,
            )
        )
        why = _why_method(spec.method, method, Need(lora=job.vram_lora, qlora=job.vram_qlora))
        text = f"attempt {attempt} started on {node.node} with {method.value}{why}"
        self._event(session, job.job_id, attempt, "started", text)
        return Claim(
            job_id=job.job_id,
            attempt=attempt,
            token=token,
            user=job.user,
            spec=spec,
            data=job.data,
            method=method,
            vram_planned=planned,
            vram_reserved=placed.reserved,
            method_why=why.strip(" ()"),
            adjustment=Adjustment(**(job.adjustment or {})),
            changes=_changes(session, job.job_id) if attempt > 1 else (),
            checkpoint=None if job.checkpoint is None else StoredCheckpoint(**job.checkpoint),
            sweep_id=job.sweep_id,
            rungs=read_rungs(session, job),
        )

    def beat(self, claim: Claim, progress: Progress) -> Beat:
        """Extend the lease and write what is new: progress, metrics, events, log lines.

        A member of a sweep that reaches a rung is compared in this transaction, and may be told to stop.
        """
        values = {
            name: value
            for name in ("stage", "step", "total_steps", "loss", "tokens_per_second", *_ETA)
            if (value := getattr(progress, name)) is not None
        }
        values = {name: v for name, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        with self._write() as session:
            wishes = (Job.cancel_requested, Job.preempted_by)
            alive = _mine(claim).values(lease_expires_at=self._now_in(self._lease_s), **values).returning(*wishes)
            row = session.execute(alive).first()
            if row is None:
                return Beat(accepted=False)
            self._record(session, claim, progress)
            return Beat(
                accepted=True,
                cancel_requested=row.cancel_requested,
                preempted_by=row.preempted_by,
                pruned=read_verdict(session, claim, rung_points(claim, progress)),
            )

    def keep_checkpoint(self, claim: Claim, checkpoint: StoredCheckpoint) -> bool:
        """Name a stored checkpoint as the one that a later attempt goes on from; False when the lease is lost."""
        with self._write() as session:
            return _rows(session, _mine(claim).values(checkpoint=vars(checkpoint))) == 1

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
            job.step, job.total_steps = progress.step or job.step, progress.total_steps or job.total_steps
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
                why = f"{job.node} was silent for {self._lease_s:.0f} s"
                self._end_attempt(session, job, Reason.WORKER_LOST, why, now)
                if job.status is Status.QUEUED and not job.held:
                    requeued.append((job.job_id, job.vram_class))
        return requeued

    def give_back(self, node: str) -> list[int]:
        """End what runs on a node as worker_lost at once: for a node that starts, with nothing of an earlier one."""
        with self._write() as session:
            now = self._now_value(session)
            mine = select(Job).where(Job.status == Status.RUNNING, Job.node == node)
            lost = list(session.scalars(mine.with_for_update(skip_locked=True)))
            for job in lost:
                self._end_attempt(session, job, Reason.WORKER_LOST, f"{node} was started anew", now)
            return [job.job_id for job in lost]

    def tokens(self, node: str) -> set[str]:
        """The tokens of the attempts that run on a node."""
        with self._read() as session:
            mine = select(Job.token).where(Job.status == Status.RUNNING, Job.node == node)
            return {token for token in session.scalars(mine) if token is not None}

    def see_node(self, state: NodeState) -> Card:
        """Write a device's row; its last sight is now. Returns the card with what runs on it."""
        with self._write() as session:
            now = self._now_value(session)
            mine = (Job.status == Status.RUNNING) & (Job.node == state.node)
            running = session.execute(select(*OCCUPANT).where(mine)).all()
            card = card_of(Node(**vars(state), seen_at=now), list(running), now, drained_targets(session, now))
            reserved = sum(job.reserved for job in card.running)
            row = {**vars(state), "seen_at": now, "free": card.free, "reserved": reserved}
            statement = self._upsert(Node).values(**row)
            session.execute(
                statement.on_conflict_do_update(index_elements=["node"], set_={k: row[k] for k in row if k != "node"})
            )
            return card

    def forget_node(self, node: str) -> None:
        """Remove the row of a node that has stopped in order."""
        with self._write() as session:
            if (row := session.get(Node, node)) is not None:
                session.delete(row)

    def waiting_classes(self, classes: Iterable[int]) -> set[int]:
        """Those of the given VRAM classes in which a job could be claimed now."""
        with self._read() as session:
            ready = _ready(self._now_value(session))
            one = select(Job.job_id).where(*ready).limit(1)
            return {size for size in classes if session.scalar(one.where(Job.vram_class == size)) is not None}

    def end_patience(self) -> list[tuple[int, int]]:
        """Permit QLoRA to jobs that have waited long enough for LoRA; returns their (job_id, vram_class)."""
        with self._write() as session:
            now = self._now_value(session)
            over = select(Job).where(sql("status = 'queued'"), Job.lora_until.is_not(None), Job.lora_until <= now)
            changed = []
            for job in session.scalars(over.limit(100).with_for_update(skip_locked=True)):
                job.lora_until = None
                _line_up(job, _node_labels(job), now)
                self._event(session, job.job_id, None, "patience", "waited long enough for LoRA: QLoRA will do now")
                changed.append((job.job_id, job.vram_class))
            return changed

    def preempt(self) -> tuple[int, ...]:
        """Ask running jobs to give way to a waiting one of higher priority that nothing else helps; returns theirs."""
        with self._write() as session:
            now = self._now_value(session)
            running = select(Job.preempted_by).where(Job.status == Status.RUNNING, Job.preemptible)
            found = session.scalars(running.with_for_update()).all()
            if not found or any(by is not None for by in found):
                return ()  # nobody is willing, or somebody is on the way out already
            cards, charges = read_cards(session, now), read_charges(session, now)
            decisions = list(place(read_levels(session, now), cards, charges, now, read_oldest(session, now)))
            starting = {d.placed.job.job_id for d in decisions if d.placed is not None}
            level = next(read_levels(session, now), {})
            anything = Openings(
                gpu=2**62, processor=(0, 0), unknown=False, labels=frozenset(c.labels for c in cards if c.open)
            )
            for job in (line.next(anything) for line in level.values()):
                way = give_way(job, cards) if job is not None and job.job_id not in starting else None
                if job is None or way is None:
                    continue
                node, going = way
                session.execute(update(Job).where(Job.job_id.in_(going)).values(preempted_by=job.job_id))
                for job_id in going:
                    text = f"asked to give way to job {job.job_id} (priority {job.priority})"
                    self._event(session, job_id, None, "preempt", text)
                self._event(session, job.job_id, None, "preempt", f"takes the room of {_listed(going)} on {node}")
                return going
            return ()

    def hold(self, job_id: int, user: str, reason: str = "") -> Job:
        """Keep a waiting job from starting until `retry`. Raises JobNotFound, WrongState."""
        text = storable(f"held by {user}: {reason}" if reason else f"held by {user}")
        with self._write() as session:
            held = _change(job_id, Status.QUEUED).values(held=True, message=text)
            if not _rows(session, held):
                job = self._get(session, job_id)
                raise WrongState(f"job {job_id} is {job.status.value}: only a waiting job can be held")
            self._event(session, job_id, None, "held", text)
            return self._get(session, job_id)

    def drain(
        self, target: str, user: str, reason: str, *, until: dt.datetime | None = None, at_once: bool = False
    ) -> None:
        """Keep new jobs from a host or a card (host:index)."""
        with self._write() as session:
            at = self._now_value(session)
            row = {"target": target, "user": user, "reason": reason, "at": at, "until": until, "now": at_once}
            statement = self._upsert(DrainOrder).values(**row)
            session.execute(statement.on_conflict_do_update(index_elements=["target"], set_=row))

    def end_drain(self, target: str) -> bool:
        """Let jobs on to a drained host or card again; False when it was not drained."""
        with self._write() as session:
            row = session.get(DrainOrder, target)
            if row is not None:
                session.delete(row)
            return row is not None

    def drains(self) -> dict[str, DrainOrder]:
        """Host or card -> the order that holds for it now."""
        with self._read() as session:
            return drained_targets(session, self._now_value(session))

    def unfinished(self, largest: int) -> int:
        """Number of jobs that run, or wait and would fit into `largest` bytes; held ones are left out."""
        waiting = (Job.status == Status.QUEUED) & ~Job.held & or_(Job.vram_needed.is_(None), Job.vram_needed <= largest)
        with self._read() as session:
            query = select(func.count()).select_from(Job).where(or_(waiting, Job.status == Status.RUNNING))
            return session.scalar(query) or 0

    # --- what loractl gc does ---

    def beyond_newest(self, keep: int) -> list[Job]:
        """Jobs whose results are beyond the `keep` newest of their user and name."""
        return self._all(beyond_newest(keep))

    def remove_result(self, job_id: int, user: str, by: str = "loractl gc") -> bool:
        """Forget a job's adapter and report, whose files may go then; False when it has none, or it is tagged."""
        with self._write() as session:
            gone = drop_result(session, job_id)
            if gone:
                self._event(session, job_id, None, "removed", f"adapter and report removed by {user} ({by})")
            return gone

    def over(self, job_ids: Collection[int]) -> Over:
        """Which of these jobs, and which of their attempts, need no files any more."""
        with self._read() as session:
            return read_over(session, job_ids)

    def forget_checkpoint(self, job_id: int) -> bool:
        """Let an ended job name no stored checkpoint, whose files may go then; False when it has not ended."""
        with self._write() as session:
            return (
                _rows(session, update(Job).where(Job.job_id == job_id, Job.status.in_(ENDED)).values(checkpoint=None))
                == 1
            )

    def needed_data(self, ended_since: dt.datetime, without: Collection[int] = ()) -> set[str]:
        """Names of the stored data sets that a job may still read."""
        with self._read() as session:
            return read_needed_data(session, ended_since, without)

    def spent_logs(self) -> list[SpentLog]:
        """Logs that are stored with their job's result, too."""
        with self._read() as session:
            return [SpentLog(job_id=j, attempt=a, size=size) for j, a, size in session.execute(spent_logs())]

    def forget_log(self, log: SpentLog) -> None:
        """Remove an attempt's log lines."""
        with self._write() as session:
            mine = (LogChunk.job_id == log.job_id) & (LogChunk.attempt == log.attempt)
            session.execute(delete(LogChunk).where(mine))

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
        sweep_id: int | None = None,
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
        if sweep_id is not None:
            query = query.where(Job.sweep_id == sweep_id)
        with self._read() as session:
            return list(session.scalars(query.limit(limit)))

    def sweep(self, sweep_id: int) -> SweepView:
        """One sweep with its members. Raises SweepNotFound."""
        for found in self.sweeps([sweep_id]):
            return found
        raise SweepNotFound(sweep_id)

    def sweeps(self, sweep_ids: Collection[int]) -> list[SweepView]:
        """Those of the sweeps that exist, with their members, by number."""
        with self._read() as session:
            return read_sweeps(session, sweep_ids)

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

    def measured(self, need_key: str | None = None, family: str | None = None, limit: int = 1000) -> list[Measured]:
        """The newest attempts on real GPUs that ended well or out of memory: all, or those of the key or the family."""
        columns = (
            Attempt.device_name, Attempt.method, Job.family, Job.need_key, Attempt.vram_planned, Attempt.vram_reserved,
            Attempt.vram_process, Attempt.vram_peak, Attempt.reason,
        )  # fmt: skip
        query = select(*columns).join(Job, Job.job_id == Attempt.job_id).where(Attempt.device_kind == "nvml")
        query = query.where(Attempt.reason.in_([Reason.OK, Reason.OUT_OF_MEMORY]))
        if need_key is not None:
            query = query.where(or_(Job.need_key == need_key, (Job.family == family) if family else sql("1 = 0")))
        with self._read() as session:
            return [
                Measured(
                    device_name=row.device_name or "unknown",
                    method=Method(row.method),
                    family=row.family,
                    need_key=row.need_key,
                    planned=row.vram_planned,
                    reserved=row.vram_reserved,
                    peak=row.vram_process or row.vram_peak,
                    out_of_memory=row.reason is Reason.OUT_OF_MEMORY,
                )
                for row in session.execute(query.order_by(Attempt.started_at.desc()).limit(limit))
            ]

    def fleet(self) -> FleetView:
        """The whole fleet at this moment, and what starts next."""
        with self._read() as session:
            return read_view(session, self._now_value(session))

    def ready(self, limit: int) -> list[Waiting]:
        """The jobs that could be claimed now, by priority and age; at most so many."""
        with self._read() as session:
            now = self._now_value(session)
            found = session.scalars(
                select(Job).where(*_ready(now)).order_by(Job.priority.desc(), Job.job_id).limit(limit)
            )
            return [waiting_of(vars(job), now) for job in found]

    def nodes(self) -> list[Node]:
        return self._all(select(Node).order_by(Node.node))

    def adapters(self) -> list[Adapter]:
        return self._all(select(Adapter).order_by(Adapter.job_id))

    def adapter(self, reference: Reference) -> Adapter:
        """The stored adapter that a person means. Raises JobNotFound, AdapterNotFound."""
        with self._read() as session:
            if reference.job_id is not None:
                self._get(session, reference.job_id)
            return find_adapter(session, reference)

    def tags(self) -> dict[int, list[str]]:
        """The tags of each job's adapter; the newest of a name has latest."""
        with self._read() as session:
            return read_tags(session)

    def tag(self, reference: Reference, tag: str, user: str) -> tuple[Adapter, int | None]:
        """Let name:tag mean this adapter; returns it, and the job whose adapter it meant before."""
        with self._write() as session:
            adapter = find_adapter(session, reference)
            before = set_tag(session, adapter, tag, user, self._now_value(session))
            if before != adapter.job_id:
                moved = f", which job {before} had" if before is not None else ""
                what = f"tagged {adapter.name}:{tag}{moved} by {user}"
                self._event(session, adapter.job_id, None, "tagged", what)
            return adapter, before

    def untag(self, reference: Reference, user: str) -> int:
        """Forget a tag; returns the job that had it. Raises AdapterNotFound."""
        with self._write() as session:
            job_id = drop_tag(session, reference.name or "", reference.tag)
            self._event(session, job_id, None, "untagged", f"lost the tag {reference} by {user}")
            return job_id

    # --- inside ---

    def _queue(self, session: Session, submission: Submission, now: dt.datetime, sweep_id: int | None = None) -> int:
        spec, until = submission.spec, None
        if spec.lora_patience is not None and submission.methods == (Method.LORA, Method.QLORA):
            until = now + dt.timedelta(seconds=spec.lora_patience)
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
            planned=vars(submission.planned),
            adjustment=submission.adjustment.as_json() or None,
            methods=[method.value for method in submission.methods],
            lora_until=until,
            need_key=submission.need_key,
            family=submission.family,
            preemptible=spec.preemptible,
            version=__version__,
            max_retries=spec.max_retries,
            status=Status.QUEUED,
            submitted_at=now,
            sweep_id=sweep_id,
        )
        _line_up(job, spec.resources.node_labels, now)
        session.add(job)
        session.flush()
        why = f", {submission.purpose}" if submission.purpose else ""
        why += "" if sweep_id is None else f" as a member of sweep {sweep_id}"
        self._event(session, job.job_id, None, "queued", f"queued by {submission.user}{why}")
        return job.job_id

    def _cancel(self, session: Session, job_id: int, user: str) -> Job:
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
        session.add(Event(job_id=job_id, attempt=attempt, at=self._now_value(session), kind=kind, text=storable(text)))

    def _refuse(self, session: Session, job: Job, error: ValidationError, now: dt.datetime) -> None:
        """Put a job whose spec this version can't read aside, so that it does not stop the jobs behind it.

        One that a newer client wrote is left to a newer worker; another one fails.
        """
        first = error.errors()[0]
        what = f"this worker's loractl does not understand {'.'.join(map(str, first['loc']))}: {first['msg']}"
        if job.version is not None and _release(job.version) > _release(__version__):
            job.not_before = now + dt.timedelta(seconds=NEWER_WORKER_DELAY_S)
            job.message = f"written by loractl {job.version}, a worker with {__version__} can't read it"
            self._event(session, job.job_id, None, "version", f"{what}; left to a worker with {job.version}")
            return
        job.status, job.reason, job.message, job.ended_at = Status.FAILED, Reason.BAD_SPEC, what, now
        self._event(session, job.job_id, None, job.status.value, what)

    def _record(self, session: Session, claim: Claim, progress: Progress) -> None:
        """Write the append-only part of a heartbeat; the caller has checked the token in this transaction."""
        rungs = [(point.step, point.metric, point.loss) for point in rung_points(claim, progress)]
        points = [
            {"job_id": claim.job_id, "attempt": claim.attempt, "step": step, "name": name, "value": value}
            for step, name, value in (*progress.metrics, *rungs)
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
                    text=storable(progress.log),
                )
            )
        if progress.adjustment is not None:
            change = _mine(claim).values(adjustment=progress.adjustment.as_json())
            session.execute(change.execution_options(synchronize_session="fetch"))
        if progress.need is not None:
            self._plan_again(session, claim, progress.need)
        names = ("vram_peak", "vram_allocated", "vram_process", "resumed_from_step")
        measured = {name: value for name in names if (value := getattr(progress, name)) is not None}
        if measured:
            session.execute(
                update(Attempt)
                .where(Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt)
                .values(**measured)
            )

    def _plan_again(self, session: Session, claim: Claim, planned: Need) -> None:
        """Take a better plan: for later attempts, and what this one reserves beyond it goes back to the card."""
        job = self._get(session, claim.job_id)
        old, new = job.planned, vars(planned)
        known = {"lora": job.vram_lora, "qlora": job.vram_qlora}
        for name, size in new.items():
            before = old.get(name)
            if size is not None:  # what was learned from measured peaks holds for the better plan too
                learned = known[name] / before if known[name] and before else 1.0
                known[name] = int(size * learned)
        job.planned, job.vram_lora, job.vram_qlora = new, known["lora"], known["qlora"]
        size = known[claim.method.value]
        if claim.vram_planned is not None or job.planned.get(claim.method.value) is not None:
            session.execute(
                update(Attempt)
                .where(Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt, Attempt.device_kind != "cpu")
                .values(vram_planned=new.get(claim.method.value))
            )
        if size is not None and job.vram_reserved is not None and size < job.vram_reserved:
            text = f"planned {gib(size)} GiB from the data's own lengths, {gib(job.vram_reserved)} were reserved"
            self._event(session, job.job_id, claim.attempt, "planned", text)
            job.vram_reserved = size

    def _end_attempt(self, session: Session, job: Job, reason: Reason, message: str, now: dt.datetime) -> None:
        """Close the running attempt and decide what becomes of the job."""
        message = storable(message)
        session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.job_id, Attempt.attempt == job.attempt)
            .values(ended_at=now, reason=reason, message=message)
        )
        outcome = OUTCOMES[reason]
        self._charge(session, job, now)
        gave, job.vram_reserved, job.preempted_by = job.vram_reserved, None, None
        job.token = job.lease_expires_at = job.stage = job.eta_seconds = job.eta_spread_seconds = None
        job.reason, job.message = reason, message
        again = (
            outcome.retryable
            and not job.cancel_requested
            and (not outcome.counts or job.retries_used < job.max_retries)
        )
        if reason is Reason.OUT_OF_MEMORY and again:
            again, message = self._need_more(session, job, gave or 0, message, now)
            job.message = message
        if not again:
            asked = job.cancel_requested and reason is not Reason.OK
            job.status, job.reason = (Status.CANCELLED, Reason.CANCELLED) if asked else (outcome.status, reason)
            job.ended_at = now
            job.checkpoint = None  # its files are removed
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

    def _charge(self, session: Session, job: Job, now: dt.datetime) -> None:
        """Add what the attempt had of its card to its user's use."""
        if job.started_at is None or not job.vram_reserved:
            return
        had = job.vram_reserved / GIB * (now - job.started_at).total_seconds() / 3600
        use = session.get(Use, job.user, with_for_update=True)
        past = 0.0 if use is None else decayed(use.gib_hours, (now - use.at).total_seconds())
        row = {"user": job.user, "gib_hours": past + had, "at": now}
        session.execute(self._upsert(Use).values(**row).on_conflict_do_update(index_elements=["user"], set_=row))

    def _need_more(self, session: Session, job: Job, gave: int, message: str, now: dt.datetime) -> tuple[bool, str]:
        """After out-of-memory: raise what the job needs beyond what it was given. False when no card has more."""
        attempt = session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
        node = session.get(Node, job.node)
        method = Method(job.method or Method.LORA.value)
        assert attempt is not None
        peak = attempt.vram_process or attempt.vram_peak or 0
        if attempt.device_kind == "nvml" and 0 < peak < OUTSIDER_SHARE * gave:
            return True, f"{message}; another program took memory of {job.node}"
        cards = session.scalars(select(Node)).all()
        gpus = [card for card in cards if card.kind != "cpu"]
        largest = max((card.usable for card in gpus or cards), default=0)
        needs = {Method.LORA: job.vram_lora, Method.QLORA: job.vram_qlora}
        # a plan says nothing of a processor's RAM: the method is tried no more
        processor = node is not None and node.kind == "cpu"
        needs[method] = max(needs[method] or 0, largest + 1 if processor else int(gave * GROWTH), int(peak * 1.05))
        need = Need(lora=needs[Method.LORA], qlora=needs[Method.QLORA])
        job.vram_lora, job.vram_qlora = need.lora, need.qlora
        limit = min(largest, job.spec.get("resources", {}).get("max_vram") or largest)
        left = within([Method(name) for name in job.methods], need, limit)
        if not left:
            more = "no card of the fleet has more" if limit == largest else "its resources.max_vram allows no more"
            return False, f"{message}; {method.value} had {gib(gave)} GiB, and {more}"
        job.lora_until = None
        job.adjustment = None  # more memory, or another method: the job's own batch may fit
        _line_up(job, _node_labels(job), now)
        return True, f"{message}; it waits for {gib(job.vram_needed)} GiB now"

    def _times_ended(self, session: Session, job_id: int, reason: Reason) -> int:
        """Attempts that ended so since a person last queued the job again: by the order of its history, since a clock
        may be set back."""
        retried = select(func.max(Event.event_id)).where(Event.job_id == job_id, Event.kind == "retry")
        began = func.coalesce(retried.scalar_subquery(), 0)
        since = select(Event.attempt).where(Event.job_id == job_id, Event.kind == "started", Event.event_id > began)
        ended = (Attempt.job_id == job_id) & (Attempt.reason == reason) & Attempt.attempt.in_(since)
        return session.scalar(select(func.count()).select_from(Attempt).where(ended)) or 0

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


def _line_up(job: Job, requires: Mapping[str, str], now: dt.datetime) -> None:
    """Write what the claim looks a waiting job up by, from its needs, methods and patience."""
    patient = job.lora_until is not None and job.lora_until > now
    methods = (Method.LORA,) if patient else tuple(Method(name) for name in job.methods)
    job.vram_needed = least_need(methods, Need(lora=job.vram_lora, qlora=job.vram_qlora))
    job.vram_class = vram_class(job.vram_needed)
    job.queue_key = queue_key(job.priority, job.vram_needed, requires, job.user)


def _changes(session: Session, job_id: int) -> tuple[str, ...]:
    """What out-of-memory has changed in a job so far, in the history's words."""
    told = select(Event.text).where(Event.job_id == job_id, Event.kind == "memory")
    return tuple(session.scalars(told.order_by(Event.event_id)))


def _listed(job_ids: Sequence[int]) -> str:
    return f"job{'s' if len(job_ids) > 1 else ''} {', '.join(map(str, job_ids))}"


def _node_labels(job: Job) -> dict[str, str]:
    labels: dict[str, str] = job.spec.get("resources", {}).get("node_labels", {})
    return labels


def _release(version: str) -> tuple[int, ...]:
    """0.2.1 as (0, 2, 1), without what follows the numbers."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


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


def _why_method(wanted: Method | Sequence[Method], taken: Method, need: Need) -> str:
    """Why this of several methods was taken, for the history."""
    preferred, *others = permitted_methods(wanted)
    if not others:
        return ""
    name = "auto" if wanted is Method.AUTO else "of several"
    if taken is not preferred:
        return f" ({name}: {preferred.value} does not fit)"
    known = need.of(taken) is not None
    return f" ({name}: it fits)" if known else f" ({name}: {taken.value} unless a plan says that it does not fit)"


def _ended_as(job: Job) -> str:
    return {Status.SUCCEEDED: "succeeded", Status.FAILED: "failed"}.get(job.status, "been cancelled")
