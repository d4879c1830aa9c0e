"""An attempt's finished result: marked ready, stored and read back, or taken over by a later attempt on this box."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from loractl.common.artifacts import WEIGHTS, attempt_prefix, manifest_sha256, sha256_of
from loractl.common.files import remove_tree
from loractl.common.job.identity import spec_digest
from loractl.common.store.records import Claim, StoredResult

from .attempt import SupervisedAttempt
from .log import LOG_FILE
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
