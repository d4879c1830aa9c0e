"""What becomes of drafts: all are checked, with what is doubtful on stderr, before all are queued together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.spec import JobSpec
from loractl.common.settings import Settings
from loractl.common.store.records import Submission
from loractl.common.store.store import Store
from loractl.common.text import clean_line
from loractl.scheduler.cli.output import hint, warn

from .draft import JobDraft, rows_at_hand
from .intake import Entry, enqueue_all, plan_all, store_all
from .lengths import check_overflow, check_used_data, unchecked
from .preflight import check_model


def queue_all(
    drafts: Sequence[JobDraft],
    settings: Settings,
    store: Store,
    artifacts: ArtifactStore,
    tell: Callable[[str], object],
) -> list[Entry]:
    """Check the drafts, upload their data and queue all of them or none. `tell`: takes the sentence about each job.

    Raises LoractlError for what submit refuses.
    """
    planned, doubts = check_all(drafts, settings, store, artifacts)
    entries = enqueue_all(store_all(drafts, planned, artifacts), settings, store)
    for entry in entries:
        tell(entry.sentence)
        warn(entry.warnings)
    warn(dict.fromkeys(doubts))
    return entries


def check_all(
    drafts: Sequence[JobDraft],
    settings: Settings,
    store: Store | None,
    artifacts: ArtifactStore,
    *,
    members: bool = False,
) -> tuple[list[Submission], list[str]]:
    """What would be queued, and what is doubtful about it; nothing is written. Warnings about files are printed.

    `store`: None where there is no database yet. `members`: of one sweep; the rows that several have are looked at
    once. Raises LoractlError for what submit refuses.
    """
    if any(draft.spec.resources.exclusive for draft in drafts):
        what = "resources.exclusive has no effect: every job trains in a process of its own"
        warn([f"Warning: {what}. Remove it; a later version refuses it."])
    looked_at = drafts
    if members:
        rows = {(draft.spec.dataset.model_dump_json(), draft.spec.evaluation.regression): draft for draft in drafts}
        looked_at = list(rows.values())
    for draft in looked_at:
        if draft.like is None:
            _warn_of_data(draft.spec, draft.job_file)
    bases = {(draft.spec.base_model, draft.spec.revision): draft.spec for draft in drafts}
    doubts = [line for spec in bases.values() for line in check_model(spec, settings)]
    planned = plan_all(drafts, settings, store, members=members)
    for draft in looked_at:
        with rows_at_hand(draft, artifacts) as spec:
            if draft.like is not None:
                _warn_of_data(spec, None)
            doubts += unchecked(check_overflow(spec, lambda: hint("Counting tokens ...")))
    return planned, doubts


def _warn_of_data(spec: JobSpec, job_file: Path | None) -> None:
    """Check the job's local data, and print warnings about what looks wrong in them. Raises DataError."""
    from loractl.common.progress import progress_bar

    with progress_bar() as report:
        findings, note = check_used_data(spec, report)
    warnings = [finding for finding in findings if finding.level == "warning"]
    warn([note] if note else [])
    told = [finding for finding in findings if finding.kind in ("several data sets", "fields that are not read")]
    name = "dataset" if spec.dataset.more else Path(spec.dataset.path).name
    warn(clean_line(f"Note: {name}: {finding.sentence}.") for finding in told)
    warn(clean_line(f"Warning: {name}: {finding.sentence}.") for finding in warnings)
    if warnings and job_file is not None:
        hint(f"See the data: loractl data check {job_file}")
