"""A job before it is queued, from a job file or like an earlier job; and what submit queued, or would queue without
--dry-run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.ancestor import settled_on
from loractl.common.job.file import amended_spec, is_set_by, load_specs, override_spec
from loractl.common.job.spec import JobSpec, data_set_key
from loractl.common.store.store import Store
from loractl.scheduler.status.job import JobState

from .ancestor import in_order
from .data import data_at_hand


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


@dataclass(frozen=True, kw_only=True)
class JobDraft:
    """A checked spec, and where it comes from."""

    spec: JobSpec
    job_file: Path | None = None
    like: int | None = None  # instead of a file: the job that it copies
    stored: Mapping[str, Any] = field(default_factory=dict)  # the data sets of that job that it takes unchanged


def of_files(paths: Sequence[Path], overrides: Sequence[str]) -> list[JobDraft]:
    """The jobs of job files, each after those of them that it starts after. Raises SpecError, UsageError."""
    drafts = [JobDraft(spec=spec, job_file=path) for path in paths for spec in load_specs(path, overrides)]
    return [drafts[place] for place in in_order([draft.spec for draft in drafts])]


def started_after(draft: JobDraft, job_ids: Sequence[int]) -> JobDraft:
    """The same draft, to start after these jobs as well."""
    after = list(dict.fromkeys([*draft.spec.after, *job_ids]))
    return replace(draft, spec=draft.spec.model_copy(update={"after": after}))


def like_job(store: Store, job_id: int, overrides: Sequence[str]) -> JobDraft:
    """A new job with a submitted job's settings and rows, except for the overrides. Raises JobNotFound, SpecError."""
    job, name = store.jobs.get(job_id), f"job {job_id}"
    chosen = job.ancestor if job.awaits is None else None  # an edit has named another sweep, which has not ended
    before = settled_on(override_spec(job.spec, (), name), chosen)
    before = before.model_copy(update={"after": [], "after_any": False})  # its turn has come
    spec = amended_spec(before.model_dump(mode="json"), overrides, name, Path.cwd())
    kept = spec.data_sets().keys() & job.data.keys()
    stored = {key: job.data[key] for key in sorted(kept) if not is_set_by(overrides, data_set_key(key))}
    return JobDraft(spec=spec, like=job_id, stored=stored)


@contextlib.contextmanager
def rows_at_hand(draft: JobDraft, artifacts: ArtifactStore) -> Iterator[JobSpec]:
    """The spec, with stored rows as files that can be checked here. From now on loractl gc leaves these rows alone.

    Raises ArtifactError for rows that are gone.
    """
    if draft.like is None or not draft.stored:
        yield draft.spec
        return
    with data_at_hand(draft.like, draft.stored, artifacts) as files:
        for file in files:
            artifacts.put_dataset(file)  # gets today's date
        yield draft.spec.with_data_sets(dict(zip(draft.stored, map(str, files), strict=True)))
