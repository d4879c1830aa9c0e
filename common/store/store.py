"""The jobs' database. Each subject has its verbs, and each verb is one transaction; the work is done in queries/.

Status changes are guarded updates: they name the state that they expect and, once a job runs, the token of the
attempt that may change it. Zero rows means that another process was there first.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

from sqlalchemy import Engine, Select

from loractl.common.channels import Channel
from loractl.common.settings import LEASE_S

from .queries import (
    adapters,
    arrivals,
    backlog,
    claims,
    durations,
    endings,
    followers,
    heartbeats,
    jobs,
    lab_settings,
    need,
    retention,
    spent,
    submissions,
    sweeps,
    usage,
)
from .queries.cards import decisions, fleet_rounds, nodes, shares
from .queries.changes import persistently
from .queries.outbox import deliveries
from .records import FleetTurn
from .schema import require_own, revision
from .tables import FinalLook, Job, OutboxMessage
from .transaction import Transaction


class Store:
    """The jobs' database: `store.jobs.submit(...)`, `store.attempts.claim(...)`."""

    def __init__(
        self, engine: Engine, clock: Callable[[], dt.datetime] | None = None, lease_s: float = LEASE_S
    ) -> None:
        """`clock` is for tests; without it leases follow the database's own. `lease_s`: how long an attempt that this
        store claims or beats for may be silent."""
        self.engine, self.clock, self.lease_s = engine, clock, lease_s
        self.jobs, self.sweeps, self.attempts = JobVerbs(self.begin), SweepVerbs(self.begin), AttemptVerbs(self.begin)
        self.cards, self.adapters = CardVerbs(self.begin), AdapterVerbs(self.begin)
        self.results, self.outbox = ResultVerbs(self.begin), OutboxVerbs(self.begin)
        self.usage, self.lab = UsageVerbs(self.begin), LabVerbs(self.begin)

    def begin(self, *, read_only: bool) -> Transaction:
        """A transaction: committed at the end of its `with`, rolled back on an error."""
        return Transaction(self.engine, clock=self.clock, lease_s=self.lease_s, read_only=read_only)

    def now(self) -> dt.datetime:
        """The database's time, which every timestamp follows."""
        with self.begin(read_only=True) as tx:
            return tx.now()

    def takes_writes(self) -> bool:
        """Whether the database can be written to: a standby, or a primary that a failover has stepped down, can't."""
        with self.begin(read_only=False) as tx:
            return tx.may_write()

    def revision(self) -> str | None:
        """The tables' revision; None for a database without loractl's tables."""
        return revision(self.engine)

    def require_own_tables(self) -> None:
        """Raises SchemaMismatch once the tables are another version's."""
        require_own(self.engine)


_AT_ONCE = 50
"""Members of a sweep that one transaction cancels."""

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
Row = TypeVar("Row")


class Begin(Protocol):
    """Begins a transaction: committed at the end of its `with`, rolled back on an error."""

    def __call__(self, *, read_only: bool) -> Transaction: ...


class Subject:
    """Verbs about one thing."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin

    def _read(self) -> Transaction:
        return self._begin(read_only=True)

    def _write(self) -> Transaction:
        return self._begin(read_only=False)


class Verb(Generic[Given, Answer]):
    """A function of (tx, ...), as a method without the transaction."""

    def __init__(self, work: Callable[Concatenate[Transaction, Given], Answer], *, read_only: bool) -> None:
        self._work, self._read_only = work, read_only
        self.__doc__ = work.__doc__

    def __get__(self, subject: Subject, kind: type[Subject]) -> Callable[Given, Answer]:
        @functools.wraps(self._work)
        def run(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
            begin = functools.partial(subject._begin, read_only=self._read_only)
            return persistently(begin, lambda tx: self._work(tx, *args, **kwargs))

        return run


def writes(work: Callable[Concatenate[Transaction, Given], Answer]) -> Verb[Given, Answer]:
    """A verb that may change rows."""
    return Verb(work, read_only=False)


def reads(work: Callable[Concatenate[Transaction, Given], Answer]) -> Verb[Given, Answer]:
    """A verb that changes nothing."""
    return Verb(work, read_only=True)


def lists(query: Callable[Given, Select[Row]]) -> Verb[Given, list[Row]]:
    """The rows that a query selects."""

    @functools.wraps(query)
    def rows(tx: Transaction, /, *args: Given.args, **kwargs: Given.kwargs) -> list[Row]:
        return list(tx.session.scalars(query(*args, **kwargs)))

    return reads(rows)


class JobVerbs(Subject):
    """Verbs about jobs."""

    submit = writes(submissions.submit)
    submit_all = writes(submissions.submit_all)
    cancel = writes(submissions.cancel)
    cancel_open = writes(submissions.cancel_open)
    hold = writes(submissions.hold)
    retry = writes(submissions.retry)
    release = writes(submissions.release)
    edit = writes(submissions.edit)
    followers = reads(followers.read_followers)

    get = reads(jobs.read_job)
    numbered = reads(jobs.read_numbered)
    matching = lists(jobs.matching)
    newest = lists(jobs.newest)
    ended = lists(jobs.ended)
    glance = reads(jobs.read_glance)
    counts = reads(jobs.read_counts)
    users = reads(jobs.read_users)

    events = lists(jobs.events)
    metrics = lists(jobs.metrics)
    thinned = reads(jobs.read_course)
    log = lists(jobs.log)
    log_end = reads(jobs.read_log_end)

    ready = reads(decisions.read_ready)
    behind = reads(decisions.read_behind)
    oldest_ready = reads(jobs.read_oldest_ready)
    waiting_classes = reads(backlog.waiting_classes)
    has_unfinished = reads(backlog.has_unfinished)
    end_patience = writes(backlog.end_patience)
    never_yielding = reads(decisions.count_never_yielding)

    def replan_outdated(self) -> list[int]:
        """Plan waiting jobs whose plans are of an older engine, if their bases are on this machine; returns them."""
        return need.replan_outdated(self._read, self._write)


class SweepVerbs(Subject):
    """Verbs about sweeps."""

    submit = writes(submissions.submit_sweep)

    def cancel(self, sweep_id: int, user: str) -> list[Job]:
        """Cancel all members of a sweep that have not ended. Raises SweepNotFound, WrongState when all have.

        A few in a transaction: PostgreSQL has all their rows locked while it commits.
        """
        with self._read() as tx:
            open_ones = submissions.read_open_members(tx, sweep_id)
        parts = [open_ones[first : first + _AT_ONCE] for first in range(0, len(open_ones), _AT_ONCE)]
        return [job for some in parts for job in self._cancel_open(some, user)]

    _cancel_open = writes(submissions.cancel_open)

    get = reads(sweeps.read_sweep)
    head = reads(sweeps.read_head)
    several = reads(sweeps.read_sweeps)
    newest = lists(sweeps.newest_sweeps)


class AttemptVerbs(Subject):
    """Verbs about attempts."""

    claim = writes(claims.claim)
    beat = writes(heartbeats.beat)
    keep_checkpoint = writes(heartbeats.keep_checkpoint)
    finish = writes(endings.finish)

    of_job = lists(jobs.attempts)
    shares = lists(shares.of_job)
    runs = reads(jobs.read_runs)
    measured = reads(jobs.read_measured)
    timed = reads(durations.read_timed)
    predicted = reads(durations.read_predicted)

    def reap(self) -> list[tuple[int, int]]:
        """End attempts with an expired lease as worker_lost; returns (job_id, vram_class) of jobs that wait again.

        Does nothing while another node does so. A transaction ends a few of them.
        """
        return endings.reap_all(self._write)


class CardVerbs(Subject):
    """Verbs about cards and their nodes."""

    arrive = writes(arrivals.arrive)
    see = writes(nodes.see)
    forget = writes(nodes.forget)
    forget_silent = writes(nodes.forget_silent)
    tokens = reads(nodes.read_tokens)
    serves_beside = reads(nodes.serves_beside)
    kept_files = lists(heartbeats.kept_files)

    drains = reads(nodes.read_drains)
    drain = writes(nodes.drain)
    end_drain = writes(nodes.end_drain)

    fleet = reads(decisions.read_view)
    preempt = writes(decisions.preempt)

    nodes = lists(nodes.nodes)  # last: it hides the module

    def take_turn(self, every_s: float, settle_s: float) -> FleetTurn | None:
        """The node's turn to do what concerns the whole fleet: reap, preempt, end_patience.

        None when another does so now, or did within `every_s`. After an outage of the database living workers have
        `settle_s` before a turn may end leases.
        """
        with self._read() as tx:
            if not fleet_rounds.is_due(tx, every_s):
                return None
        with self._write() as tx:
            return fleet_rounds.take_turn(tx, every_s, settle_s)


class AdapterVerbs(Subject):
    """Verbs about adapters."""

    all = lists(adapters.every)
    newest = lists(adapters.newest_adapters)
    get = reads(adapters.read_adapter)
    tags = reads(adapters.read_tags)
    tag = writes(adapters.tag)
    untag = writes(adapters.untag)
    ancestors = reads(adapters.read_ancestors)
    descendants = reads(adapters.read_descendants)


class ResultVerbs(Subject):
    """Verbs about results, logs, checkpoints and rows that gc may remove."""

    looks = lists(adapters.looks)
    not_bound = lists(retention.not_bound)
    bind = writes(retention.bind_result)
    beyond_newest = reads(retention.read_beyond_newest)
    remove = writes(retention.remove_result)

    over = reads(retention.read_over)
    needed_data = reads(retention.read_needed_data)
    forget_checkpoint = writes(retention.forget_checkpoint)
    forget_finished = writes(retention.forget_finished)
    spent_logs = reads(retention.read_spent_logs)
    forget_log = writes(retention.forget_log)
    past_jobs = reads(retention.read_past)
    forget_jobs = writes(retention.forget_jobs)
    courses = reads(retention.read_courses)
    forget_courses = writes(retention.forget_courses)

    def look(self, job_id: int, rows_sha256: str, user: str) -> list[FinalLook]:
        """Write down that `user` is shown what a job measured on final rows; returns all looks at these rows, this one
        last. Raises JobNotFound."""
        with self._write() as tx:
            mine = adapters.look(tx, job_id, rows_sha256, user)
        # read once it is committed: of two looks at once, the later one to commit counts both
        return sorted(self.looks(rows_sha256), key=lambda one: (one.look_id == mine, one.look_id))


class OutboxVerbs(Subject):
    """Verbs about messages."""

    settle = writes(deliveries.settle)
    stuck = reads(deliveries.read_stuck)
    traffic = reads(deliveries.read_traffic)

    def lease(self, channels: Sequence[Channel], lease_s: float) -> OutboxMessage | None:
        """The oldest message that is due on one of the channels; for `lease_s` nobody else gets it. None: none is."""
        with self._read() as tx:
            if not deliveries.is_due(tx, channels):
                return None
        with self._write() as tx:
            return deliveries.lease(tx, channels, lease_s)


class UsageVerbs(Subject):
    """Verbs about usage."""

    since = reads(spent.read_spent)
    card_hours = reads(spent.read_card_hours)
    allowances = reads(spent.read_allowances)
    past = reads(spent.read_past)
    set_quota = writes(usage.set_quota)
    remove_quota = writes(usage.remove_quota)


class LabVerbs(Subject):
    """Verbs about the lab as a whole."""

    setting = reads(lab_settings.read_setting)
    set = writes(lab_settings.write_setting)
    named_store = reads(lab_settings.read_named_store)
