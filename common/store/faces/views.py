"""The part of the store's face that the page and the metrics use: lists, thinned lines, counts. Nothing is written."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection

from sqlalchemy import select, union

from loractl.common.errors import SweepNotFound
from loractl.common.job.status import Status
from loractl.common.job.sweep import SweepView

from ..queries import jobs, looks, sweeps
from ..queries.cards import shares
from ..queries.outbox import deliveries
from ..records import ChannelTraffic, CoursePoint, JobCount, Page, PastRun, StuckMessages
from ..schema import revision
from ..tables import AttemptShare, FinalLook, Job, LogChunk, Sweep, Use
from .retention import RetentionStore


class ViewStore(RetentionStore):
    """The jobs' database as somebody sees it who looks at all of it often."""

    def revision(self) -> str | None:
        """The tables' revision; None for a database without loractl's tables."""
        return revision(self._engine)

    def ended(self, since: dt.datetime, limit: int) -> list[Job]:
        """The jobs that ended last, the newest first."""
        return self._all(jobs.ended(since, limit))

    def numbered(self, job_ids: Collection[int]) -> dict[int, Job]:
        """Those of the jobs that exist, by number."""
        return {job.job_id: job for job in self._all(select(Job).where(Job.job_id.in_(job_ids)))}

    def shares(self, job_id: int) -> list[AttemptShare]:
        """What a job's attempts on several cards have, or had, of each, by attempt and rank."""
        return self._all(shares.of_job(job_id))

    def thinned(self, job_ids: Collection[int], name: str, most: int) -> list[CoursePoint]:
        """A metric of each job in its order, thinned to about `most` points a job; the last one is always there."""
        with self._read() as tx:
            return jobs.read_course(tx, job_ids, name, most)

    def log_end(self, job_id: int, chunks: int) -> list[LogChunk]:
        """The last chunks of a job's log, in their order."""
        return self._all(jobs.log_end(job_id, chunks))[::-1]

    def log_part(self, job_id: int, after: int, chunks: int) -> list[LogChunk]:
        """So many chunks of a job's log behind the one numbered `after`."""
        return self._all(jobs.log(job_id, after).limit(chunks))

    def newest_sweeps(self, page: Page) -> list[Sweep]:
        """The page's sweeps, the newest first, and one more where there is one."""
        return self._all(sweeps.newest_sweeps(page))

    def sweep_lines(self, sweep_ids: Collection[int]) -> list[SweepView]:
        """Those of the sweeps that exist, by number; without the settings of their members."""
        with self._read() as tx:
            return sweeps.read_sweeps(tx.session, sweep_ids, settings=False)

    def sweep_head(self, sweep_id: int) -> Sweep:
        """A sweep's own row, without its members. Raises SweepNotFound."""
        for row in self._all(select(Sweep).where(Sweep.sweep_id == sweep_id)):
            return row
        raise SweepNotFound(sweep_id)

    def looks(self, rows_sha256: str) -> list[FinalLook]:
        """All looks at what was measured on these final rows, in their order."""
        return self._all(looks.looks(rows_sha256))

    def users(self) -> list[str]:
        """Everybody who ever had a card, has one, or waits for one, by name."""
        unended = select(Job.user).where(Job.status.in_([Status.QUEUED, Status.RUNNING]))
        with self._read() as tx:
            return sorted(tx.session.scalars(union(select(Use.user), unended)))

    def counts(self) -> list[JobCount]:
        """How many jobs are in each state, and why."""
        with self._read() as tx:
            return jobs.read_counts(tx)

    def oldest_ready(self) -> dt.datetime | None:
        """When the oldest job that could be claimed now was submitted; None: there is none."""
        with self._read() as tx:
            return tx.session.scalar(jobs.oldest_ready(tx.now()))

    def stuck_messages(self) -> list[StuckMessages]:
        """Messages that no process takes, and those that were given up within a day, by channel."""
        with self._read() as tx:
            return deliveries.read_stuck(tx)

    def traffic(self) -> list[ChannelTraffic]:
        """How many messages wait, were sent and were given up within a day, by channel."""
        with self._read() as tx:
            return deliveries.read_traffic(tx)

    def runs(self, since: dt.datetime, until: dt.datetime) -> list[PastRun]:
        """The attempts that began or ended after `since`, up to `until`."""
        with self._read() as tx:
            return jobs.read_runs(tx, since, until)
