"""What an ended attempt leaves on its box and in the artifact store: kept for the next one within bounds, or
removed."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from loractl.common.errors import ArtifactError, LoractlError, ServiceUnreachable
from loractl.common.files import remove_tree
from loractl.common.job.status import KEEPING, Status
from loractl.common.store.database import DatabaseError

from .attempt import SupervisedAttempt
from .result import READY
from .storage.client import CallWatch
from .workplace import Workplace

log = logging.getLogger("loractl.worker")

BEGUN_FROM = "begun-from"
"""The folder with the adapter that an attempt starts from."""

CHECKPOINTS_KEPT = 2
"""The newest checkpoints of a job that stay on a box, of all its attempts there: one of them may be torn."""


REMOVAL_S = 10.0
"""A store that is silent for this long is abandoned: the slot is for the next job, and loractl gc removes the rest."""


def clean(place: Workplace, attempt: SupervisedAttempt, status: Status | None) -> None:
    """Remove what no next attempt of the job can use. One may already run: its files are not touched."""
    job_id = attempt.claim.job_id
    if status is not None and status.is_terminal:
        try:
            over = _is_over(place, attempt)
        except (DatabaseError, LoractlError) as error:
            log.warning("job %s: its files stay for loractl gc: %s", job_id, error)
            return
        if over:
            _remove(place, attempt)
            return
    for name in ("keeping", BEGUN_FROM):
        shutil.rmtree(attempt.folder / name, ignore_errors=True)
    if not (attempt.folder / READY).exists():
        shutil.rmtree(attempt.folder / "result", ignore_errors=True)
    _thin_out(attempt)


def make_room(place: Workplace, folder: Path, needed: int) -> None:
    """If fewer than `needed` bytes are free on `folder`'s disk, remove what ended jobs left on this box, oldest first.

    An attempt that can run comes before one that may be retried. The history of a job that loses its files says so.
    """
    host, work = place.settings.host, place.settings.work_dir
    if shutil.disk_usage(folder).free >= needed:
        return
    found = {int(path.name): path for path in work.iterdir() if re.fullmatch(r"[1-9]\d{0,17}", path.name, re.ASCII)}
    ended = place.store.results.over(found).jobs
    for job_id in sorted(ended, key=lambda job_id: _changed_at(found[job_id])):
        left = _below(found[job_id])  # before we ask: a later attempt has its own folder
        if left and place.store.results.forget_finished(job_id, host, "its disk was needed for another job"):
            log.warning("job %s: what it left here is removed, the disk is needed", job_id)
            for path in left:
                remove_tree(path)
        if shutil.disk_usage(folder).free >= needed:
            return


def _changed_at(folder: Path) -> float:
    """0 for a missing folder: a job, or another attempt of it, that has just ended removes its own."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _below(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _is_over(place: Workplace, attempt: SupervisedAttempt) -> bool:
    """Whether the job no longer needs its files, by its current row: a person may have queued it again."""
    job = place.store.jobs.get(attempt.claim.job_id)
    return job.status.is_terminal and job.attempt == attempt.claim.attempt and job.reason not in KEEPING


def _remove(place: Workplace, attempt: SupervisedAttempt) -> None:
    """All that this attempt and earlier ones have left."""
    job_id, number = attempt.claim.job_id, attempt.claim.attempt
    for folder in [*_own(attempt), attempt.folder.parent / "stored"]:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not empty, or gone
        attempt.folder.parent.rmdir()
    try:
        place.artifacts.watched(CallWatch(deadline_s=REMOVAL_S)).remove_checkpoints(job_id, number)
    except (ArtifactError, ServiceUnreachable) as error:
        log.warning("job %s: its checkpoints stay for loractl gc: %s", job_id, error.sentence)


def _thin_out(attempt: SupervisedAttempt) -> None:
    """Of several attempts on this box, keep only the newest checkpoints, and finished results."""
    found = [path for folder in _own(attempt) for path in folder.glob("checkpoints/checkpoint-*")]
    by_age = sorted(found, key=_changed_at)
    for checkpoint in by_age[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(checkpoint, ignore_errors=True)
    for folder in _own(attempt):
        if not (folder / READY).exists() and not any(folder.glob("checkpoints/checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)


def _own(attempt: SupervisedAttempt) -> Iterator[Path]:
    """The folders of this attempt and of earlier ones on this box."""
    for folder in sorted(attempt.folder.parent.glob("attempt-*")):
        number = re.fullmatch(r"attempt-(\d+)", folder.name, re.ASCII)
        if number is not None and int(number[1]) <= attempt.claim.attempt:
            yield folder
