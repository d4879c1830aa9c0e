"""The face of the jobs' database: a method for each verb, in one transaction. The work is done in queries/.

Status changes are guarded updates: they name the state that they expect and, once a job runs, the token of the
attempt that may change it. Zero rows means that another process was there first.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import select

from loractl.common.channel.channels import Channel
from loractl.common.errors import SweepNotFound
from loractl.common.job.reference import Reference
from loractl.common.job.status import Reason, Status
from loractl.common.job.sweep import NewSweep, SweepView
from loractl.common.memory.correction import Measured
from loractl.common.placement.joins import Newcomer
from loractl.common.placement.lines import Waiting

from . import aside
from .faces.devices import DeviceStore
from .fleet import FleetView
from .queries import (
    adapters,
    backlog,
    claims,
    endings,
    heartbeats,
    jobs,
    lines,
    looks,
    need,
    retention,
    submissions,
    sweeps,
    wishes,
)
from .queries.cards import decisions, fleet_rounds, nodes, preemption
from .queries.jobs import Glance
from .queries.outbox import deliveries, notices
from .records import (
    Amendment,
    Aside,
    Beat,
    Choice,
    Claim,
    Delivery,
    FleetTurn,
    Left,
    Page,
    Parcel,
    Progress,
    StoredCheckpoint,
    StoredResult,
    Submission,
)
from .tables import Adapter, Attempt, Event, FinalLook, Job, LogChunk, MetricPoint

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


class Store(DeviceStore):
    """The jobs' database."""

    # --- what a person does ---

    def submit(self, submission: Submission) -> int:
        """Write a QUEUED job; its number is durable when this returns."""
        with self._write() as tx:
            return submissions.submit(tx, submission)

    def submit_sweep(self, sweep: NewSweep, members: Sequence[Submission]) -> int:
        """Write all members of a sweep as QUEUED jobs, or none; returns the sweep's number."""
        with self._write() as tx:
            return submissions.submit_sweep(tx, sweep, members)

    def cancel(self, job_id: int, user: str) -> Job:
        """Cancel a waiting job now, or ask a running one's trainer to stop.

        Raises JobNotFound, WrongState when it has ended.
        """
        with self._write() as tx:
            return wishes.cancel(tx, job_id, user)

    def cancel_sweep(self, sweep_id: int, user: str) -> list[Job]:
        """Cancel all members of a sweep that have not ended. Raises SweepNotFound, WrongState when all have."""
        with self._write() as tx:
            return wishes.cancel_sweep(tx, sweep_id, user)

    def hold(self, job_id: int, user: str, reason: str = "") -> Job:
        """Keep a waiting job from starting until `retry`. Raises JobNotFound, WrongState."""
        with self._write() as tx:
            return wishes.hold(tx, job_id, user, reason)

    def retry(self, job_id: int, user: str, amendment: Amendment | None = None) -> Job:
        """Queue a failed, cancelled or held job again, with all its retries, and what is to change of it.

        Raises JobNotFound, WrongState.
        """
        with self._write() as tx:
            return wishes.retry(tx, job_id, user, amendment)

    def edit(self, amendment: Amendment, user: str) -> Job:
        """Change what is asked of a job. Raises JobNotFound, WrongState when it is no more as it was looked at."""
        with self._write() as tx:
            return wishes.edit(tx, amendment, user)

    def drain(
        self, target: str, user: str, reason: str, *, until: dt.datetime | None = None, at_once: bool = False
    ) -> None:
        """Keep new jobs from a host or a card (host:index)."""
        with self._write() as tx:
            nodes.drain(tx, target, user, reason, until, at_once)

    def end_drain(self, target: str) -> bool:
        """Let jobs on to a drained host or card again; False when it was not drained."""
        with self._write() as tx:
            return nodes.end_drain(tx, target)

    def tag(self, reference: Reference, tag: str, user: str) -> tuple[Adapter, int | None]:
        """Let name:tag mean this adapter; returns it, and the job of the adapter that the tag named before."""
        with self._write() as tx:
            return adapters.tag(tx, reference, tag, user)

    def untag(self, reference: Reference, user: str) -> int:
        """Forget a tag; returns the job that had it. Raises AdapterNotFound."""
        with self._write() as tx:
            return adapters.untag(tx, reference, user)

    def look(self, job_id: int, rows_sha256: str, user: str) -> list[FinalLook]:
        """Write down that `user` is shown what a job measured on final rows; returns all looks at these rows, this one
        last. Raises JobNotFound."""
        with self._write() as tx:
            mine = looks.look(tx, job_id, rows_sha256, user)
        # read once it is committed: of two looks at once, the later one to commit counts both
        return sorted(self.looks(rows_sha256), key=lambda one: (one.look_id == mine, one.look_id))

    def not_bound(self) -> list[Job]:
        """Jobs whose results an earlier version stored: their rows don't have the hash of the manifest."""
        return self._all(retention.not_bound())

    def bind_result(self, job_id: int, manifest_sha256: str, user: str) -> bool:
        """Write the hash of a result's manifest into its row; False when it has none to bind, or has a hash already."""
        with self._write() as tx:
            return retention.bind_result(tx, job_id, manifest_sha256, user)

    # --- what a node does ---

    def claim(
        self,
        node: str,
        outside: int | None = None,
        used: Mapping[str, int] | None = None,
        distrusted: frozenset[str] = frozenset(),
        joins: bool = False,
        gangs: bool = False,
    ) -> Claim | Left | None:
        """Take the job that the placement rule gives this card: a token, a lease and a part of its memory.

        `outside`, `used`: what the device shows at this moment (bytes held by others; bytes by job), when that is newer
        than the node's row. `distrusted`: nodes that did not take what was left to them; the rule goes without them.
        `joins`: the node can put a job into a trainer that has others. `gangs`: it can start one on several cards.
        Left: the rule gives every job that fits here to other cards; without nodes, look again at once. None: nothing
        fits.
        """
        with self._write() as tx:
            return claims.claim(tx, node, self._lease_s, outside, used or {}, distrusted, joins, gangs)

    def beat(self, claim: Claim, progress: Progress) -> Beat:
        """Extend the lease and write what is new: progress, metrics, events, log lines.

        A member of a sweep that reaches a rung is compared in this transaction, and may be told to stop.
        """
        with self._write() as tx:
            return heartbeats.beat(tx, claim, progress, self._lease_s)

    def keep_checkpoint(self, claim: Claim, checkpoint: StoredCheckpoint) -> bool:
        """Name a stored checkpoint as the one that a later attempt goes on from; False when the lease is lost."""
        with self._write() as tx:
            return heartbeats.keep_checkpoint(tx, claim, checkpoint)

    def finish(
        self,
        claim: Claim,
        reason: Reason,
        message: str,
        progress: Progress,
        result: StoredResult | None = None,
        *,
        inside: bool = False,
        card: str | None = None,
    ) -> Status | None:
        """End the attempt; the job succeeds, fails, is cancelled, or waits for its next attempt.

        `inside`: it is not out of its host yet, and what it reserves stays held until `leave_host`.
        `card`: of several the one that failed.
        Returns the job's status afterwards, or None when the lease was lost: then nothing was written.
        """
        if (reason is Reason.OK) != (result is not None):
            raise ValueError("a result goes with reason ok, and only with it")
        with self._write() as tx:
            return endings.finish(tx, claim, reason, message, progress, result, inside, card)

    def take_turn(self, node: str, every_s: float, settle_s: float) -> FleetTurn | None:
        """The node's turn to do what concerns the whole fleet: reap, preempt, end_patience.

        None when another does so now, or did within `every_s`. After an outage of the database living workers have
        `settle_s` before a turn may end leases.
        """
        with self._read() as tx:
            if not fleet_rounds.is_due(tx, every_s):
                return None
        with self._write() as tx:
            return fleet_rounds.take_turn(tx, node, self._lease_s, every_s, settle_s)

    def reap(self) -> list[tuple[int, int]]:
        """End attempts with an expired lease as worker_lost; returns (job_id, vram_class) of jobs that wait again.

        Does nothing while another node does so. A transaction ends a few of them.
        """
        return endings.reap_all(self._write, self._lease_s)

    def give_back(self, node: str) -> list[int]:
        """End what runs on a node as worker_lost at once. A node calls it when it starts: it has no attempts yet."""
        with self._write() as tx:
            return endings.give_back(tx, node)

    def set_aside_unreadable(self, after: int | None = None) -> Aside:
        """End waiting jobs whose rows this version can't read, or leave them to a newer worker.

        It looks at some, behind the one that is numbered `after`; None: at the first.
        """
        with self._write() as tx:
            found = aside.set_aside_unreadable(tx, after)
            notices.tell_of_jobs(tx, found.jobs)
            return found

    def preempt(self) -> tuple[int, ...]:
        """Ask running jobs to give way to one of higher priority when nothing else helps; returns the jobs asked."""
        with self._write() as tx:
            return preemption.preempt(tx, self._lease_s)

    def end_patience(self) -> list[tuple[int, int]]:
        """Permit QLoRA to jobs that have waited long enough for LoRA; returns their (job_id, vram_class)."""
        with self._write() as tx:
            return backlog.end_patience(tx)

    def plan_anew(self) -> list[int]:
        """Plan waiting jobs whose plans are of an older engine, where their bases are on this machine; returns them."""
        return need.plan_anew(self._read, self._write)

    def lease_message(self, channels: Sequence[Channel], lease_s: float) -> Parcel | None:
        """The oldest message that is due on one of the channels; for `lease_s` nobody else gets it. None: none is."""
        with self._read() as tx:
            if not deliveries.is_due(tx, channels):
                return None
        with self._write() as tx:
            return deliveries.lease(tx, channels, lease_s)

    def settle_message(self, parcel: Parcel, delivery: Delivery) -> bool:
        """Write what became of a try to send: sent, due again later, or given up. False when the lease was lost."""
        with self._write() as tx:
            return deliveries.settle(tx, parcel, delivery)

    def takes_writes(self) -> bool:
        """Whether the database can be written to: a standby, or a primary that a failover has stepped down, can't."""
        with self._write() as tx:
            return tx.may_write()

    def waiting_classes(self, classes: Iterable[int]) -> set[int]:
        """The given VRAM classes that have a job to claim now."""
        with self._read() as tx:
            return backlog.waiting_classes(tx, classes)

    def has_unfinished(self, largest: int | None, labels: Mapping[str, str]) -> bool:
        """Whether a job runs, or waits, is not held, and would fit into `largest` bytes of a box with these labels.
        None: the box takes no jobs."""
        with self._read() as tx:
            return backlog.has_unfinished(tx, largest, labels)

    # --- what a person reads ---

    def now(self) -> dt.datetime:
        """The database's time, which every timestamp follows."""
        with self._read() as tx:
            return tx.now()

    def job(self, job_id: int) -> Job:
        """One job. Raises JobNotFound."""
        with self._read() as tx:
            return jobs.with_wishes(tx, [jobs.read_job(tx, job_id)])[0]

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
        with self._read() as tx:
            found = tx.session.scalars(jobs.matching(statuses, user, label, ended_since, sweep_id).limit(limit))
            return jobs.with_wishes(tx, found.all())

    def newest(self, choice: Choice, page: Page) -> list[Job]:
        """The page's jobs in any state, the newest first, and one more where there is one."""
        return self._all(jobs.newest(choice, page))

    def glance(
        self, choice: Choice, page: Page, ended_since: dt.datetime, *, alone: bool = False, most_sweeps: int = 20
    ) -> Glance:
        """What runs, a page of what waits, and numbers for the rest.

        `alone`: the page has no members of sweeps. Raises JobNotFound for a page after a job that does not exist.
        """
        with self._read() as tx:
            return jobs.read_glance(tx, choice, page, ended_since, alone, most_sweeps)

    def attempts(self, job_id: int) -> list[Attempt]:
        return self._all(jobs.attempts(job_id))

    def events(self, job_id: int) -> list[Event]:
        return self._all(jobs.events(job_id))

    def metrics(self, job_id: int, name: str) -> list[MetricPoint]:
        """The points of one metric, by attempt and step."""
        return self._all(jobs.metrics(job_id, name))

    def log(self, job_id: int, after: int = 0) -> list[LogChunk]:
        """Log chunks of all attempts with a chunk_id above `after`."""
        return self._all(jobs.log(job_id, after))

    def measured(self, need_key: str | None = None, family: str | None = None, limit: int = 1000) -> list[Measured]:
        """Attempts on real GPUs that ended well or out of memory, the newest first: all, or those of the `limit` newest
        jobs of the key and of the family."""
        with self._read() as tx:
            return jobs.read_measured(tx, need_key, family, limit)

    def sweep(self, sweep_id: int) -> SweepView:
        """One sweep with its members. Raises SweepNotFound."""
        for view in self.sweeps([sweep_id]):
            return view
        raise SweepNotFound(sweep_id)

    def sweeps(self, sweep_ids: Collection[int]) -> list[SweepView]:
        """Those of the sweeps that exist, with their members, by number."""
        with self._read() as tx:
            return sweeps.read_sweeps(tx.session, sweep_ids)

    def fleet(self) -> FleetView:
        """The whole fleet at this moment, and what starts next."""
        with self._read() as tx:
            return decisions.read_view(tx.session, tx.now())

    def ready(self, limit: int) -> list[Waiting]:
        """The first jobs that could be claimed now, in the order in which the rule tries them; at most so many."""
        with self._read() as tx:
            now = tx.now()
            return lines.read_order(tx.session, now, nodes.read_charges(tx.session, now), limit)

    def newcomers(self, waiting: Sequence[Waiting]) -> dict[int, Newcomer]:
        """Those of the waiting jobs that have an open host on their base, as the rule asks for them, by number."""
        with self._read() as tx:
            return decisions.read_newcomers(tx.session, tx.now(), waiting)

    def would_start(self, changed: Waiting, spec: JobSpec | None = None) -> str | None:
        """The card that the rule would give a waiting job now if it had this form, alone or beside others on its base;
        None: no card. `spec`: the form's job file, where it has another than its row."""
        with self._read() as tx:
            return decisions.read_start(tx.session, tx.now(), changed, spec)

    def adapters(self) -> list[Adapter]:
        return self._all(select(Adapter).order_by(Adapter.job_id))

    def newest_adapters(self, page: Page) -> list[Adapter]:
        """The page's adapters, the newest job first, and one more where there is one."""
        return self._all(adapters.newest_adapters(page))

    def adapter(self, reference: Reference) -> Adapter:
        """The stored adapter that a person means. Raises JobNotFound, AdapterNotFound."""
        with self._read() as tx:
            return adapters.read_adapter(tx, reference)

    def tags(self, job_ids: Collection[int] | None = None) -> dict[int, list[str]]:
        """The tags of each job's adapter, or of these jobs; the newest of a name has latest."""
        with self._read() as tx:
            return adapters.read_tags(tx, job_ids)

    def ancestors(self, job_ids: Collection[int]) -> dict[int, int]:
        """The job whose adapter each of these was begun from; those of a fresh adapter are left out."""
        with self._read() as tx:
            return adapters.read_ancestors(tx, job_ids)

    def descendants(self, job_id: int) -> list[int]:
        """The jobs that wait or run and begin from this one's adapter."""
        with self._read() as tx:
            return adapters.read_descendants(tx, job_id)
