"""Uploads a training's newest checkpoint while it continues, so that any box can resume it."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from loractl.common.artifacts import checkpoint_prefix, manifest_sha256
from loractl.common.errors import ArtifactError, NotStorable, ServiceUnreachable
from loractl.common.store.database import REFUSALS, told_by
from loractl.common.store.records import Claim, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.worker.clock import SYSTEM, NodeClock

from .storage.client import REMOVAL, StoreClient
from .workplace import away

log = logging.getLogger("loractl.worker")

AGAIN_S = 15.0
"""Seconds before a failed upload is tried again."""


@dataclass(kw_only=True)
class _Copy:
    """A checkpoint to upload."""

    step: int
    folder: Path
    stored: StoredCheckpoint | None = None  # its files are in the store; the row does not name it yet


class CheckpointUpload:
    """Uploads in its own thread; of several waiting checkpoints only the newest is kept.

    A checkpoint counts once the row names it. Only the attempt that holds the lease can write that.
    """

    def __init__(
        self, artifacts: StoreClient, store: Store, claim: Claim, folder: Path, clock: NodeClock = SYSTEM
    ) -> None:
        self._told = artifacts.watch.silent
        self._artifacts = artifacts.watched(
            replace(artifacts.watch, silent=self._fall_silent, going_on=lambda: self._set_silent(False))
        )
        self._removing = artifacts.watched(REMOVAL)
        self.silent = False  # the store has not answered a call of ours for long
        self._store = store
        self._claim = claim
        self._clock = clock
        self._folder = folder  # copies of what is being uploaded: the trainer removes its own as newer ones come
        self._waiting: _Copy | None = None
        self._kept = claim.checkpoint
        self._spent: list[str] = []  # prefixes of checkpoints that no row names any more, not removed yet
        self._changed = threading.Condition()
        self._closing = False
        self._thread = clock.start(self._run, "checkpoints")

    def offer(self, checkpoint: Path, step: int) -> None:
        """Take a complete checkpoint's files (by hard links: no bytes are copied) and return at once."""
        aside = self._folder / f"step-{step}"
        if aside.exists():
            return  # the same step is already waiting
        try:
            aside.mkdir(parents=True)
            for path in checkpoint.iterdir():
                if path.is_file():
                    _link(path, aside / path.name)
        except OSError as error:  # the training has its own copy, and continues
            gone = isinstance(error, FileNotFoundError)
            why = "was replaced before it could be kept" if gone else f"can't be kept for the store: {error.strerror}"
            log.warning("job %s: checkpoint %s %s", self._claim.job_id, step, why)
            shutil.rmtree(aside, ignore_errors=True)
            return
        with self._changed:
            replaced, self._waiting = self._waiting, _Copy(step=step, folder=aside)
            self._changed.notify()
        if replaced is not None:
            shutil.rmtree(replaced.folder, ignore_errors=True)

    def close(self) -> None:
        """Take no more checkpoints. The caller may wait for the rest, or leave it: the local checkpoint stays."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def done(self, timeout: float) -> bool:
        """Wait at most this long for the last upload; True when all is done."""
        return self._clock.join(self._thread, timeout)

    def _fall_silent(self, doing: str) -> None:
        if not self.silent:
            self._told(doing)
        self._set_silent(True)

    def _set_silent(self, silent: bool) -> None:
        self.silent = silent

    def _run(self) -> None:
        while True:
            with self._changed:
                self._clock.wait_for(self._changed, lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                copy, self._waiting = self._waiting, None
            if self._keep(copy):
                shutil.rmtree(copy.folder, ignore_errors=True)
                continue
            with self._changed:
                if self._closing:
                    return
                if self._waiting is None:
                    self._waiting = copy
                else:
                    shutil.rmtree(copy.folder, ignore_errors=True)
                self._wait_again()

    def _wait_again(self) -> None:
        """Before the next try, unless a newer checkpoint or the end comes first. The lock is held."""
        waiting = self._waiting
        self._clock.wait_for(self._changed, lambda: self._closing or self._waiting is not waiting, AGAIN_S)

    def _keep(self, copy: _Copy) -> bool:
        """Upload it, name it in the row, remove the previous one. False: worth another try."""
        claim, began = self._claim, self._clock.now()
        try:
            if copy.stored is None:
                prefix = checkpoint_prefix(claim.job_id, claim.attempt, copy.step)
                sha256 = manifest_sha256(self._artifacts.put_result(copy.folder, prefix))
                copy.stored = StoredCheckpoint(step=copy.step, prefix=prefix, manifest_sha256=sha256)
            if not self._store.attempts.keep_checkpoint(claim, copy.stored):
                self._remove_unnamed(copy.stored.prefix)
                return True
        except Exception as error:  # noqa: BLE001  if this thread ended, no later checkpoint would be stored
            return self._tell_of_failure(copy, error)
        self.silent = False
        took = self._clock.now() - began
        log.debug("job %s: the checkpoint of step %s is stored (%.1f s)", claim.job_id, copy.step, took)
        before, self._kept = self._kept, copy.stored
        if before is not None:
            self._spent.append(before.prefix)
        self._remove_spent(copy.stored.prefix)
        return True

    def _remove_unnamed(self, prefix: str) -> None:
        """The lease is lost: no row will name it. One may do so, where an earlier try was written and its answer lost,
        and the next attempt goes on from it."""
        job = self._store.jobs.numbered([self._claim.job_id]).get(self._claim.job_id)
        if job is None or (job.checkpoint or {}).get("prefix") != prefix:
            self._removing.remove_checkpoint(prefix)

    def _tell_of_failure(self, copy: _Copy, error: Exception) -> bool:
        """True: the copy is gone, and no other try can help. An ended attempt removes its copies, even during an
        upload; then no one needs them."""
        job_id, step = self._claim.job_id, copy.step
        if copy.stored is None and (isinstance(error, FileNotFoundError) or not copy.folder.is_dir()):
            level = logging.DEBUG if self._closing else logging.WARNING
            log.log(level, "job %s: the checkpoint of step %s was removed before it was stored", job_id, step)
            return True
        if isinstance(error, NotStorable):
            log.warning("job %s: the checkpoint of step %s can't be stored: %s", job_id, step, error.sentence)
            return True
        if isinstance(error, (ArtifactError, ServiceUnreachable, *REFUSALS)):
            why = away(error) or told_by(error)
            log.warning("job %s: the checkpoint of step %s is not stored yet: %s", job_id, step, why)
        else:  # a box may be out of processes
            log.error("job %s: the checkpoint of step %s is not stored yet", job_id, step, exc_info=error)
        return False

    def _remove_spent(self, named: str) -> None:
        """Remove all but the one that the row names. What the store does not remove now is removed with the next
        one."""
        left = [prefix for prefix in self._spent if prefix != named]  # a step saved twice is one checkpoint
        self._spent = []
        for prefix in left:
            try:
                self._removing.remove_checkpoint(prefix)
            except Exception as error:  # noqa: BLE001  as for an upload: this thread goes on
                log.warning("job %s: the checkpoint %s is not removed yet: %s", self._claim.job_id, prefix, error)
                self._spent.append(prefix)


def _link(path: Path, aside: Path) -> None:
    """A hard link to a file; a copy if the file system has none. Raises OSError."""
    try:
        os.link(path, aside)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(path, aside)
