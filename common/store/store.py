"""The jobs' database. Each subject has its verbs, and each verb is one transaction; the work is done in queries/.

Status changes are guarded updates: they name the state that they expect and, once a job runs, the token of the
attempt that may change it. Zero rows means that another process was there first.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from sqlalchemy import Engine

from loractl.common.settings import LEASE_S

from .schema import require_own, revision
from .transaction import Transaction
from .verbs import (
    AdapterVerbs,
    AttemptVerbs,
    CardVerbs,
    JobVerbs,
    LabVerbs,
    OutboxVerbs,
    ResultVerbs,
    SweepVerbs,
    UsageVerbs,
)


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
