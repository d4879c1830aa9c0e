"""What becomes of drafts: all are checked, with what is doubtful on stderr, before all are queued together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loractl.scheduler.cli.output import hint, warn

from .draft import rows_at_hand
from .intake import Entry, enqueue_all, plan_all, store_all
from .overflow import check_overflow, unchecked
from .preflight import check_model
from .warnings import warn_of_data, warn_of_keys

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore
    from loractl.common.settings import Settings
    from loractl.common.store.records import Submission
    from loractl.common.store.store import Store

    from .draft import JobDraft


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
    drafts: Sequence[JobDraft], settings: Settings, store: Store | None, artifacts: ArtifactStore
) -> tuple[list[Submission], list[str]]:
    """What would be queued, and what is doubtful about it; nothing is written. Warnings about files are printed.

    `store`: None where there is no database yet. Raises LoractlError for what submit refuses.
    """
    warn_of_keys(draft.spec for draft in drafts)
    for draft in drafts:
        if draft.like is None:
            warn_of_data(draft.spec, draft.job_file)
    doubts = [line for draft in drafts for line in check_model(draft.spec, settings)]
    planned = plan_all(drafts, settings, store)
    for draft in drafts:
        with rows_at_hand(draft, artifacts) as spec:
            if draft.like is not None:
                warn_of_data(spec, None)
            doubts += unchecked(check_overflow(spec, lambda: hint("Counting tokens ...")))
    return planned, doubts
