"""What submit queued, or would queue without --dry-run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.scheduler.status.job import JobState

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class JobDrafts:
    """What a submit would queue."""

    specs: tuple[JobSpec, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """Each job's resolved spec, with every key of a job file."""
        return [spec.model_dump(mode="json") for spec in self.specs]


@dataclass(frozen=True, kw_only=True)
class QueuedJobs:
    """What a submit queued."""

    jobs: tuple[JobState, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """Each job as status shows it, in the order of the job files."""
        return [job.as_json() for job in self.jobs]
