"""What an attempt leaves: a finished result is marked ready, stored and read back, or taken over by a later attempt;
all else on its box and in the artifact store is kept for the next one within bounds, or removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from loractl.common.artifacts import WEIGHTS, attempt_prefix, manifest_sha256, sha256_of
from loractl.common.errors import ArtifactError, LoractlError, ServiceUnreachable
from loractl.common.files import remove_tree
from loractl.common.job.identity import spec_digest
from loractl.common.job.status import KEEPING, Status
from loractl.common.store.database import DatabaseError
from loractl.common.store.records import Claim, StoredResult

from .attempt import SupervisedAttempt
from .log import LOG_FILE
from .storage.client import REMOVAL
from .workplace import Workplace

READY = "ready.json"
"""A note next to a complete result: the spec, method and data that it is for."""


def take_ready(attempt: SupervisedAttempt) -> str | None:
    """Take over a result that an earlier attempt on this box finished and could not store; returns its trainer's last
    message, None without a result. Its note is moved last: the attempt may be stopped or killed here."""
    claim, folder = attempt.claim, attempt.folder
    for earlier in sorted(folder.parent.glob("attempt-*")):
        message = ready_result(earlier, claim)
        if message is None or earlier == folder:
            continue
        for name in ("result", LOG_FILE, READY):
            remove_tree(folder / name)
            (earlier / name).rename(folder / name)
        attempt.unwritten.note(
            "ready", f"{earlier.name} had finished and could not be stored: its result is taken over"
        )
        return message
    return None


def mark_ready(folder: Path, claim: Claim, message: str) -> None:
    """Note that a result is complete: if storing fails, a later attempt on this box need not train again."""
    ready = {"belongs_to": _asked(claim), "message": message, "files": _hashes(folder / "result")}
    (folder / READY).write_text(json.dumps(ready), "utf-8")


def ready_result(folder: Path, claim: Claim) -> str | None:
    """The note next to a finished result of the same job; None without one.

    Its files are compared with the note: after a power loss a box may have the note but not all files.
    """
    try:
        ready = json.loads((folder / READY).read_text("utf-8"))
        hashes = _hashes(folder / "result")
    except (OSError, ValueError):
        return None
    files: dict[str, str] = ready.get("files") or {"": ""}  # an older note names no files: the result may be torn
    whole = all(hashes.get(name) == digest for name, digest in files.items() if name != LOG_FILE)
    message: str = ready.get("message", "")
    return message if ready.get("belongs_to") == _asked(claim) and whole else None


def store_result(place: Workplace, attempt: SupervisedAttempt) -> StoredResult:
    """Upload the result and read it back. Raises ArtifactError, ServiceUnreachable."""
    prefix = attempt_prefix(attempt.claim.job_id, attempt.claim.attempt)
    shutil.copy(attempt.folder / LOG_FILE, attempt.folder / "result" / LOG_FILE)
    manifest = place.artifacts.put_result(attempt.folder / "result", prefix)
    uri = f"{place.artifacts.url}/{prefix}"
    return StoredResult(
        adapter_uri=f"{uri}/adapter",
        report_uri=f"{uri}/report.json",
        adapter_size=sum(file.size for name, file in manifest.items() if name.startswith("adapter/")),
        adapter_sha256=manifest[WEIGHTS].sha256,
        manifest_sha256=manifest_sha256(manifest),
    )


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a result except its log, which grows with every attempt to store it."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: sha256_of(path) for name, path in files.items() if name != LOG_FILE}


def _asked(claim: Claim) -> list[str]:
    """What a result is for: the spec, the method and the data."""
    hashes = [stored["sha256"] for _, stored in sorted(claim.data.items())]
    return [spec_digest(claim.spec), claim.method.value, *hashes]


log = logging.getLogger("loractl.worker")

BEGUN_FROM = "begun-from"
"""The folder with the adapter that an attempt starts from."""

CHECKPOINTS_KEPT = 2
"""The newest checkpoints of a job that stay on a box, of all its attempts there: one of them may be torn."""


def clean(place: Workplace, attempt: SupervisedAttempt, status: Status | None) -> None:
    """Remove what no next attempt of the job can use. One may already run: its files are not touched."""
    job_id = attempt.claim.job_id
    if status is not None and status.is_terminal:
        try:
            job = place.store.jobs.get(job_id)  # its current row: a person may have queued it again
        except (DatabaseError, LoractlError) as error:
            log.warning("job %s: its files stay for loractl gc: %s", job_id, error)
            return
        if job.status.is_terminal and job.reason not in KEEPING:
            _remove(place, attempt)
            return
    for name in ("keeping", BEGUN_FROM):
        shutil.rmtree(attempt.folder / name, ignore_errors=True)
    if not (attempt.folder / READY).exists():
        shutil.rmtree(attempt.folder / "result", ignore_errors=True)
    # of several attempts on this box, keep only the newest checkpoints, and finished results
    found = [path for folder in _own(attempt) for path in folder.glob("checkpoints/checkpoint-*")]
    for checkpoint in sorted(found, key=_reached)[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(checkpoint, ignore_errors=True)
    for folder in _own(attempt):
        if not (folder / READY).exists() and not any(folder.glob("checkpoints/checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)


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


def _remove(place: Workplace, attempt: SupervisedAttempt) -> None:
    """All that this attempt and earlier ones have left."""
    job_id, number = attempt.claim.job_id, attempt.claim.attempt
    for folder in [*_own(attempt), attempt.stored]:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not empty, or gone
        attempt.folder.parent.rmdir()
    try:
        place.artifacts.watched(REMOVAL).remove_checkpoints(job_id, number)
    except (ArtifactError, ServiceUnreachable) as error:
        log.warning("job %s: its checkpoints stay for loractl gc: %s", job_id, error.sentence)


def _reached(checkpoint: Path) -> tuple[int, int]:
    """Its attempt and its step: the box's clock may have gone back since an older one was written."""
    attempt, step = (int(name.rpartition("-")[2]) for name in (checkpoint.parents[1].name, checkpoint.name))
    return attempt, step


def _own(attempt: SupervisedAttempt) -> Iterator[Path]:
    """The folders of this attempt and of earlier ones on this box."""
    for folder in sorted(attempt.folder.parent.glob("attempt-*")):
        number = re.fullmatch(r"attempt-(\d+)", folder.name, re.ASCII)
        if number is not None and int(number[1]) <= attempt.claim.attempt:
            yield folder
