"""A job's log: the lines in the database, and those stored with its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .job import JobState, state_of

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


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
