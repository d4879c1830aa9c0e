"""The part of the store's face that loractl gc uses: what may go, and its removal."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection
from typing import TypeVar

from sqlalchemy import Engine, Select

from loractl.common.settings import LEASE_S

from ..queries import retention
from ..records import Over, PastJob, SpentLog
from ..tables import Job
from ..transaction import Transaction

Row = TypeVar("Row")


class RetentionStore:
    """The jobs' database as gc sees it. `clock` is for tests; without it leases follow the database's own clock.

    `lease_s`: how long an attempt that this store claims or beats for may be silent.
    """

    def __init__(
        self, engine: Engine, clock: Callable[[], dt.datetime] | None = None, lease_s: float = LEASE_S
    ) -> None:
        self._engine = engine
        self._lease_s = lease_s
        self._clock = clock

    def beyond_newest(self, keep: int) -> list[Job]:
        """Jobs with results beyond the `keep` newest of their user and name."""
        return self._all(retention.beyond_newest(keep))

    def remove_result(self, job_id: int, user: str, by: str = "loractl gc") -> bool:
        """Forget a job's adapter and report: their files may go then. False when it has none, it is tagged, or an
        open job begins from it."""
        with self._write() as tx:
            return retention.remove_result(tx, job_id, user, by)

    def over(self, job_ids: Collection[int], kept_since: dt.datetime | None = None) -> Over:
        """Which of these jobs, and which of their attempts, need no files any more.

        A job that failed since then keeps what a retry goes on from.
        """
        with self._read() as tx:
            return retention.read_over(tx, job_ids, kept_since)

    def forget_checkpoint(self, job_id: int) -> int | None:
        """Forget an ended job's stored checkpoint. Returns its newest attempt: the files of those up to it may go then,
        and a retry's may not. None when the job has not ended."""
        with self._write() as tx:
            return retention.forget_checkpoint(tx, job_id)

    def forget_finished(self, job_id: int, host: str, why: str) -> bool:
        """Forget what an ended job has left on a box: it may go then. False when the job has not ended."""
        with self._write() as tx:
            return retention.forget_finished(tx, job_id, host, why)

    def needed_data(self, ended_since: dt.datetime, without: Collection[int] = ()) -> set[str]:
        """Names of the stored data sets that a job may still read."""
        with self._read() as tx:
            return retention.read_needed_data(tx, ended_since, without)

    def spent_logs(self) -> list[SpentLog]:
        """Logs that are stored with their job's result, too."""
        with self._read() as tx:
            return retention.read_spent_logs(tx)

    def forget_log(self, log: SpentLog) -> None:
        """Remove an attempt's log lines."""
        with self._write() as tx:
            retention.forget_log(tx, log)

    def past_jobs(self, ended_before: dt.datetime, without: Collection[int] = ()) -> list[PastJob]:
        """Jobs without a result that ended before that, by number; none of a sweep that goes on.

        `without`: jobs with results that count as removed.
        """
        with self._read() as tx:
            return retention.read_past(tx, ended_before, without)

    def forget_jobs(self, job_ids: Collection[int], ended_before: dt.datetime) -> set[int]:
        """Remove such jobs with all their rows, and sweeps that have no member left; returns the jobs that went."""
        with self._write() as tx:
            return retention.forget_jobs(tx, job_ids, ended_before)

    def courses(self, ended_before: dt.datetime) -> list[PastJob]:
        """Jobs with a result that ended before that and have values of single steps, by number."""
        with self._read() as tx:
            return retention.read_courses(tx, ended_before)

    def forget_courses(self, job_ids: Collection[int]) -> None:
        """Remove the values of single steps; those that sweeps are judged by stay."""
        with self._write() as tx:
            retention.forget_courses(tx, job_ids)

    # --- inside ---

    def _write(self) -> Transaction:
        return Transaction(self._engine, clock=self._clock, read_only=False)

    def _read(self) -> Transaction:
        return Transaction(self._engine, clock=self._clock, read_only=True)

    def _all(self, query: Select[Row]) -> list[Row]:
        with self._read() as tx:
            return list(tx.session.scalars(query))
