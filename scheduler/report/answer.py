"""The evaluation report of a finished job, and what else its result holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.binding import result_binding
from loractl.common.errors import WrongState
from loractl.common.job.status import Status

from .final import FinalResult, look
from .page import guarded

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore, Binding
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """A job that has succeeded, and where its files are."""

    job: Job
    stored: Binding


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What the trainer measured of base and tuned model."""

    job_id: int
    user: str
    content: dict[str, Any]  # of report.json
    final: FinalResult | None = None  # of a job with final rows that is in no sweep

    def as_json(self) -> dict[str, Any]:
        """report.json as the trainer wrote it; docs/instructions.md explains what it says. `final`, if it is there and
        the job is in no sweep, with the looks at it (see FinalResult)."""
        return self.content if self.final is None else {**self.content, "final": self.final.as_json()}


def report(store: Store, artifacts: ArtifactStore, job_id: int, user: str) -> EvaluationReport:
    """The report of a finished job, for `user`. Raises JobNotFound, WrongState, ArtifactError."""
    result = result_of(store, job_id)
    content = artifacts.read_report(result.stored)
    final = look(store, artifacts, job_id, result.stored, user) if result.job.sweep_id is None else None
    return EvaluationReport(job_id=job_id, user=result.job.user, content=content, final=final)


def report_page(store: Store, artifacts: ArtifactStore, job_id: int) -> bytes:
    """The report as an HTML page in which nothing runs. Raises JobNotFound, WrongState, ArtifactError."""
    return guarded(artifacts.read_bytes(result_of(store, job_id).stored, "report.html"), job_id)


def result_of(store: Store, job_id: int) -> JobResult:
    """The job and the place of its verified result. Raises JobNotFound; WrongState while there is no result."""
    job = store.jobs.get(job_id)
    if job.status is not Status.SUCCEEDED:
        raise WrongState(
            f"job {job_id} has no result: it {job.status.in_words}", f"loractl status {job_id} shows its state"
        )
    if job.report_uri is None:
        raise WrongState(
            f"job {job_id} no longer has a result: it was removed",
            f"loractl show {job_id} says who and when",
        )
    return JobResult(job=job, stored=result_binding(store, job))
