"""One attempt from claim to finish: data fetched, trainer started and watched, artifacts stored, the row closed.

The supervisor holds the claim. It beats every few seconds, passes on what the trainer tells, and stops the trainer when
the job is cancelled, over its time, drained, or no longer ours. Nothing is listed unless the last guarded write won.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from loractl.common.artifacts import ArtifactStore, attempt_prefix, remove_tree, sha256_of
from loractl.common.errors import ArtifactError, LoractlError, ServiceUnreachable
from loractl.common.job.adjustment import Adjustment, in_words, next_adjustment
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.placement.rule import Need
from loractl.common.settings import Settings
from loractl.common.store.database import outage
from loractl.common.store.records import Claim, Progress, StoredResult
from loractl.common.store.store import Store
from loractl.common.store.sweeps import rung_points
from loractl.worker.device.devices import Device
from loractl.worker.device.occupancy import (
    CARD_VARIABLE,
    JOB_VARIABLE,
    RUN_VARIABLE,
    card_mark,
    end_leftovers,
    run_mark,
)
from loractl.worker.protocol.marker import is_complete
from loractl.worker.protocol.messages import (
    Adjusted,
    Ended,
    Note,
    Peaks,
    Planned,
    Saved,
    StageChanged,
    Start,
    Stepped,
    Stop,
    Told,
)
from loractl.worker.protocol.trust import Refused, check_checkpoint, check_claim, may_run_code

from .disk import bytes_to_write, require_space
from .log import LogBook, read_log
from .process import exit_reason, kill, read_messages, send
from .upload import CheckpointKeeper

log = logging.getLogger("loractl.worker")
Answer = TypeVar("Answer")

BEAT_S = 5.0
"""How often a running job's row is written, with a short lease more often; a cancel acts within this and a step."""

BEATS_A_LEASE = 6
"""At the least: a beat or two may be late."""

STOP_GRACE_S = 10.0
"""After a cancel, a time limit or a lost lease the trainer has so long before it is killed."""

DRAIN_GRACE_S = 120.0
"""A drain waits so long for the current step and its checkpoint."""

CHECKPOINT_GRACE_S = 60.0
"""After a training's end its last checkpoint has so long to reach the artifact store; another box may want it."""

SILENCE_S = 1800.0
"""A trainer that trains or evaluates and says nothing for so long hangs; it tells each step, at most one a second."""

SAY_EVERY_S = 10.0
"""At a worker's terminal a job's steps are named so often; its history has them all."""

READY = "ready.json"
"""Beside a result that is complete: what it answers to."""


class Drain:
    """The box's wish to stop, as a file that every process of the node sees: "checkpoint" or "now"."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, how: str) -> None:
        """Ask for a stop. A node that hears of the first Ctrl-C late must not take the second one's "now" back."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if how == "now":
            self._path.write_text(how)
            return
        with contextlib.suppress(FileExistsError), self._path.open("x") as file:
            file.write(how)

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)

    @property
    def wish(self) -> str | None:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return None


class _Interrupted(Exception):
    """Fetching or storing was left: the lease is lost, or the job is cancelled or drained."""


@dataclass(kw_only=True)
class _State:
    """What the loop of one attempt knows so far."""

    adjustment: Adjustment  # what out-of-memory has changed in the job so far
    peaks: Peaks = field(default_factory=Peaks)
    step: int = 0
    ended: Ended | None = None
    forced: tuple[Reason, str] | None = None  # why we stopped the trainer
    kill_at: float | None = None
    lease_lost: bool = False
    cancel_requested: bool = False
    preempted_by: int | None = None
    pruned: str | None = None  # why its sweep stops the job
    heard: float = field(default_factory=time.monotonic)  # when the trainer last said something
    said: float = -math.inf  # when a step was last named at the terminal
    store_away: bool = False  # what is to be fetched or stored waits for the artifact store
    changes: list[str] = field(default_factory=list)  # what this trainer said of its adjustments
    saved: list[Saved] = field(default_factory=list)  # checkpoints that are not handed on yet
    pending: Progress = field(default_factory=Progress)  # told, not yet written
    noted: queue.SimpleQueue[tuple[str, str]] = field(default_factory=queue.SimpleQueue)  # events of the work thread
    log: LogBook = field(default_factory=LogBook)


class Supervisor:
    """Runs claims on one device."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        artifacts: ArtifactStore,
        device: Device,
        node: str,
        drain: Drain,
        threads: int,
    ) -> None:
        self._settings = settings
        self._store = store
        self._artifacts = artifacts
        self._device = device
        self._node = node
        self._drain = drain
        self._threads = threads
        self._beat_s = min(BEAT_S, settings.lease_s / BEATS_A_LEASE)

    def run(self, claim: Claim) -> Status | None:
        """Run one attempt to its end; returns the job's status, None when the lease was lost on the way."""
        folder = self._settings.work_dir / str(claim.job_id) / f"attempt-{claim.attempt}"
        log.info("job %s %s: attempt %s with %s", claim.job_id, claim.spec.name, claim.attempt, claim.method.value)
        state = _State(adjustment=claim.adjustment)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "result").mkdir(parents=True)
            if not self._take_ready(claim, folder, state):
                start = self._beating(claim, state, lambda: self._patiently(claim, state, self._prepare, folder))
                self._train(claim, start, folder, state)
            reason, message = self._judge(state)
            result = None
            if reason is Reason.OK:
                state.pending = replace(state.pending, stage=Stage.STORING)
                mark_ready(folder, claim, message)
                result = self._beating(claim, state, lambda: self._patiently(claim, state, self._keep, folder))
        except _Interrupted:
            reason, message, result = *self._judge(state), None
        except (LoractlError, OSError) as error:
            reason, message, result = *_explain(error), None
        except Exception as error:
            # our own fault, and still the job must say at once why it ended
            log.exception("job %s: the supervisor failed", claim.job_id)
            reason, message, result = Reason.TRAINER_ERROR, f"the supervisor failed: {error!r}", None
        if state.lease_lost:
            log.warning("job %s: the lease of attempt %s was lost, its result is dropped", claim.job_id, claim.attempt)
            shutil.rmtree(folder / "result", ignore_errors=True)  # the next attempt may go on from its checkpoints
            return None
        last = self._progress(state, last=True)
        status = self._insist(lambda: self._store.finish(claim, reason, message, last, result))
        log.info(
            "job %s %s: %s (%s) %s",
            claim.job_id,
            claim.spec.name,
            status.value if status else "lost",
            reason.value,
            message,
        )
        self._clean(claim, folder, status)
        return status

    def _prepare(self, claim: Claim, folder: Path) -> Start:
        """Fetch the data and say what the trainer shall do."""
        spec, cache = claim.spec, self._settings.cache_dir
        check_claim(spec, claim.data, self._settings)
        if claim.checkpoint is not None:
            check_checkpoint(claim.job_id, claim.checkpoint)
        require_space(folder, bytes_to_write(spec, claim.method))

        named = spec.data_sets()  # those that are not stored are hub ids
        for key in named.keys() & claim.data.keys():
            stored = claim.data[key]
            named[key] = str(self._artifacts.fetch_dataset(stored["uri"], stored["sha256"], cache / "datasets"))
        hashes = {key: stored["sha256"] for key, stored in claim.data.items()}
        data = [Path(path) for path in named.values() if Path(path).is_file()]
        require_space(folder, bytes_to_write(spec, claim.method, sum(path.stat().st_size for path in data)))
        earlier = sorted(folder.parent.glob("attempt-*/checkpoints"), key=lambda p: p.stat().st_mtime, reverse=True)
        earlier += self._stored_checkpoint(claim, folder.parent / "stored")
        return Start(
            job_id=claim.job_id,
            attempt=claim.attempt,
            user=claim.user,
            node=self._node,
            gpu=self._device.uuid,
            device=self._device.trains_on,
            device_name=self._device.name,
            spec=spec,
            run_code=may_run_code(spec, self._settings),
            lm_eval_tasks=str(self._settings.lm_eval_tasks) if self._settings.lm_eval_tasks else None,
            method=claim.method,
            method_why=claim.method_why,
            vram_planned=claim.vram_planned,
            vram_reserved=claim.vram_reserved,
            # A plan is for a card: RAM is limited only where the box's owner says so.
            memory_limit=claim.vram_reserved if self._device.trains_on == "cuda" else self._settings.trainer_ram,
            adjustment=claim.adjustment,
            changes=list(claim.changes),
            data_path=named["path"],
            data_sha256=hashes.get("path"),
            eval_path=named.get("eval_path"),
            eval_sha256=hashes.get("eval_path"),
            regression_path=named.get("regression"),
            regression_sha256=hashes.get("regression"),
            output_dir=str(folder / "result"),
            checkpoint_dir=str(folder / "checkpoints"),
            earlier_checkpoints=[str(p) for p in earlier],
            cache_dir=str(cache),
        )

    def _stored_checkpoint(self, claim: Claim, folder: Path) -> list[Path]:
        """The newest checkpoint from the artifact store, which another box may have written, unless it is here."""
        kept = claim.checkpoint
        here = [] if kept is None else folder.parent.glob(f"attempt-*/checkpoints/checkpoint-{kept.step}")
        if kept is None or any(map(is_complete, here)):
            return []
        remove_tree(folder)
        target = folder / "checkpoints" / f"checkpoint-{kept.step}"
        try:
            self._artifacts.pull(kept.prefix, "", target)
        except ArtifactError as error:
            log.warning("job %s: the checkpoint of step %s is lost: %s", claim.job_id, kept.step, error.sentence)
            return []
        return [folder / "checkpoints"]

    def _train(self, claim: Claim, start: Start, folder: Path, state: _State) -> None:
        """Run a trainer to its end; when it runs out of memory in mid-training another one, with less.

        A new process, because only its memory is whole again; it goes on from the last checkpoint.
        """
        began = time.monotonic()
        keeper = CheckpointKeeper(self._artifacts, self._store, claim, folder / "keeping")
        try:
            self._train_with_less(claim, start, folder, state, began, keeper)
        finally:
            # of a training that is done, cancelled, pruned or no longer ours nobody will want the last one
            over = state.lease_lost or state.cancel_requested or self._judge(state)[0] in (Reason.OK, Reason.PRUNED)
            self._close(keeper, claim, state, 0.0 if over or self._drain.wish == "now" else CHECKPOINT_GRACE_S)

    def _close(self, keeper: CheckpointKeeper, claim: Claim, state: _State, patience_s: float) -> None:
        """Wait so long for the last checkpoint to be stored, and keep the lease meanwhile."""
        keeper.close()
        deadline = time.monotonic() + patience_s
        while not keeper.done(min(self._beat_s, max(0.0, deadline - time.monotonic()))):
            if state.lease_lost or state.cancel_requested or time.monotonic() >= deadline:
                return
            self._beat(claim, state)

    def _train_with_less(
        self, claim: Claim, start: Start, folder: Path, state: _State, began: float, keeper: CheckpointKeeper
    ) -> None:
        while True:
            self._watch(claim, start, folder, state, began, keeper)
            lighter = _lighter(start, state)
            if lighter is None:
                return
            text = in_words(start.spec, state.adjustment, lighter, where=f"at step {state.step}", then="starts again")
            log.info("job %s: %s", claim.job_id, text)
            events = (*state.pending.events, ("memory", text))
            state.pending = replace(state.pending, adjustment=lighter, events=events)
            state.adjustment, state.ended = lighter, None
            start = start.model_copy(update={"adjustment": lighter, "changes": [*start.changes, *state.changes, text]})
            state.changes = []

    def _watch(
        self, claim: Claim, start: Start, folder: Path, state: _State, began: float, keeper: CheckpointKeeper
    ) -> None:
        """Start the trainer and stay with it until it has ended."""
        told: queue.SimpleQueue[Told | str] = queue.SimpleQueue()
        with (folder / "log.txt").open("a", encoding="utf-8") as log_file:
            trainer = subprocess.Popen(
                [sys.executable, "-m", self._settings.trainer],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env=self._environment(claim),
            )
            assert trainer.stdin and trainer.stdout and trainer.stderr
            readers = [
                threading.Thread(target=read_messages, args=(trainer.stdout, told, start.job_id), daemon=True),
                threading.Thread(target=read_log, args=(trainer.stderr, log_file, state.log), daemon=True),
            ]
            for reader in readers:
                reader.start()
            send(trainer.stdin, start)
            try:
                self._loop(claim, trainer, told, state, began, keeper)
            finally:
                kill(trainer)
                end_leftovers(run_mark(claim.token))  # what holds the pipes open would make the readers wait
                for reader in readers:
                    reader.join(timeout=5)
        _take_all(told, state)
        _hand_on(state, keeper)
        if state.ended is None and state.forced is None and not state.lease_lost:
            limited = start.device == "cpu" and start.memory_limit is not None
            state.ended = Ended(job_id=start.job_id, **exit_reason(trainer.returncode, limited=limited))

    def _loop(
        self,
        claim: Claim,
        trainer: subprocess.Popen[str],
        told: queue.SimpleQueue[Any],
        state: _State,
        began: float,
        keeper: CheckpointKeeper,
    ) -> None:
        next_beat, stage, rung, state.heard = 0.0, None, 0, time.monotonic()
        limit = claim.spec.resources.time_limit
        while trainer.poll() is None and state.ended is None:
            _take_all(told, state, timeout=0.2)
            _hand_on(state, keeper)
            now = time.monotonic()
            reached = _rung_reached(claim, state)
            if now >= next_beat or state.pending.stage != stage or reached > rung:
                stage, rung, next_beat = state.pending.stage, max(rung, reached), now + self._beat_s
                self._beat(claim, state)
                if state.cancel_requested:
                    self._stop(claim, trainer, state, Reason.CANCELLED, "cancelled while it ran", save=False)
                elif state.pruned is not None:
                    self._stop(claim, trainer, state, Reason.PRUNED, state.pruned, save=False)
                elif state.preempted_by is not None:
                    why = f"gave way to job {state.preempted_by}, which has a higher priority"
                    self._stop(claim, trainer, state, Reason.PREEMPTED, why, save=True, grace=DRAIN_GRACE_S)
            if state.lease_lost:
                return
            if now - max(state.heard, state.log.heard) > SILENCE_S and state.pending.stage in (
                Stage.TRAINING,
                Stage.EVALUATING,
            ):
                state.forced = Reason.TRAINER_ERROR, f"the trainer said nothing for {SILENCE_S / 60:.0f} min"
                return
            if limit is not None and now - began > limit:
                self._stop(
                    claim,
                    trainer,
                    state,
                    Reason.TIMED_OUT,
                    f"ran longer than resources.time_limit ({limit:.0f} s)",
                    save=True,
                )
            if (wish := self._drain.wish) is not None:
                if wish == "now":
                    state.forced = Reason.DRAINED, "the worker was stopped at once"
                    return
                self._stop(
                    claim, trainer, state, Reason.DRAINED, "the worker is being stopped", save=True, grace=DRAIN_GRACE_S
                )
            if state.kill_at is not None and now > state.kill_at:
                log.warning("job %s: the trainer did not stop in time and is killed", claim.job_id)
                return

    def _beat(self, claim: Claim, state: _State) -> None:
        """One heartbeat. With the database away the training goes on: the lease decides."""
        try:
            beat = self._store.beat(claim, self._progress(state))
        except DBAPIError as error:
            if (why := outage(error)) is None:
                raise
            log.warning("job %s: the database is away, training goes on: %s", claim.job_id, why)
            return
        state.pending = Progress(stage=state.pending.stage)
        state.log.written()
        state.lease_lost = not beat.accepted
        state.cancel_requested, state.preempted_by = beat.cancel_requested, beat.preempted_by
        state.pruned = beat.pruned or state.pruned

    def _progress(self, state: _State, *, last: bool = False) -> Progress:
        """What is new since the last write that came through."""
        while not state.noted.empty():
            state.pending = replace(state.pending, events=(*state.pending.events, state.noted.get()))
        return replace(
            state.pending,
            vram_peak=state.peaks.reserved,
            vram_allocated=state.peaks.allocated,
            vram_process=state.peaks.process,
            log=state.log.take(last=last),
        )

    def _stop(
        self,
        claim: Claim,
        trainer: subprocess.Popen[str],
        state: _State,
        reason: Reason,
        message: str,
        *,
        save: bool,
        grace: float = STOP_GRACE_S,
    ) -> None:
        """Ask the trainer to end, once; it is killed after the grace period."""
        if state.forced is not None and (state.forced[0] is reason or reason is not Reason.CANCELLED):
            return
        state.forced = reason, message
        state.kill_at = time.monotonic() + grace
        assert trainer.stdin
        send(trainer.stdin, Stop(job_id=claim.job_id, save=save))

    def _judge(self, state: _State) -> tuple[Reason, str]:
        """The attempt's reason: what the trainer said, unless we stopped it before it was done."""
        if state.ended is not None and (state.forced is None or state.ended.reason is Reason.OK):
            return state.ended.reason, state.ended.message
        if state.forced is not None:
            return state.forced
        return Reason.TRAINER_ERROR, "the trainer said nothing"

    def _keep(self, claim: Claim, folder: Path) -> StoredResult:
        """Upload the result and read it back."""
        prefix = attempt_prefix(claim.job_id, claim.attempt)
        shutil.copy(folder / "log.txt", folder / "result" / "log.txt")
        manifest = self._artifacts.put_result(folder / "result", prefix)
        uri = f"{self._artifacts.url}/{prefix}"
        return StoredResult(
            adapter_uri=f"{uri}/adapter",
            report_uri=f"{uri}/report.json",
            adapter_size=sum(f.size for name, f in manifest.items() if name.startswith("adapter/")),
            adapter_sha256=manifest["adapter/adapter_model.safetensors"].sha256,
        )

    def _beating(self, claim: Claim, state: _State, work: Callable[[], Answer]) -> Answer:
        """Do slow work on our own side (fetching, uploading) in a thread, while the heartbeat goes on."""
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def do() -> None:
            try:
                outcome.put(work())
            except Exception as error:  # noqa: BLE001  handed to the thread that waits for it, which raises it
                outcome.put(error)

        threading.Thread(target=do, name="work", daemon=True).start()
        while True:
            self._beat(claim, state)
            self._interrupt(state)
            try:
                done = outcome.get(timeout=self._beat_s)
            except queue.Empty:
                continue
            if isinstance(done, Exception):
                raise done
            return done

    def _interrupt(self, state: _State) -> None:
        """Leave slow work of our own when nobody wants its result. Raises _Interrupted.

        A training that is done is stored even while its box is drained: that is what the wait was for.
        """
        if state.lease_lost:
            raise _Interrupted
        if state.ended is not None:
            if state.store_away and (state.cancel_requested or self._drain.wish is not None):
                cancelled = Reason.CANCELLED, "cancelled while it waited for the artifact store"
                drained = Reason.DRAINED, "the worker was stopped while the artifact store was away"
                state.ended, state.forced = None, cancelled if state.cancel_requested else drained
                raise _Interrupted
            return
        if state.cancel_requested:
            state.forced = Reason.CANCELLED, "cancelled before it trained"
        elif self._drain.wish is not None:
            state.forced = Reason.DRAINED, "the worker was stopped before it trained"
        if state.forced is not None:
            raise _Interrupted

    def _patiently(self, claim: Claim, state: _State, work: Callable[[Claim, Path], Answer], folder: Path) -> Answer:
        """Fetch or store, again and again while the artifact store is away: that is nobody's fault but the lab's.

        The job shows the stage that it is in, and the reason stands in its history.
        """
        delay, deadline = 2.0, time.monotonic() + self._settings.store_patience_s
        while True:
            try:
                answer = work(claim, folder)
            except (ArtifactError, ServiceUnreachable) as error:
                passing = isinstance(error, ServiceUnreachable) or work == self._keep
                if not passing or time.monotonic() + delay > deadline or state.lease_lost:
                    raise
                if not state.store_away:
                    log.warning("job %s: %s; tried again until it works", claim.job_id, error.sentence)
                    state.noted.put(("store", f"{error.sentence}; it is tried again"))
                state.store_away = True
                time.sleep(delay)
                delay = min(delay * 2, 30.0)
                continue
            state.store_away = False
            return answer

    def _take_ready(self, claim: Claim, folder: Path, state: _State) -> bool:
        """Take over a result that an earlier attempt on this box finished and could not store."""
        for earlier in sorted(folder.parent.glob("attempt-*")):
            message = ready_result(earlier, claim)
            if message is None or earlier == folder:
                continue
            for name in ("result", "log.txt"):
                remove_tree(folder / name)
                (earlier / name).rename(folder / name)
            (earlier / READY).unlink()
            state.ended = Ended(job_id=claim.job_id, reason=Reason.OK, message=message)
            text = f"{earlier.name} had finished and could not be stored: its result is taken over"
            state.pending = replace(state.pending, events=(("ready", text),))
            return True
        return False

    def _insist(self, write: Callable[[], Answer]) -> Answer:
        """Repeat a last write until the database is back: an outage must not cost a finished training."""
        delay = 0.5
        while True:
            try:
                return write()
            except DBAPIError as error:
                if (why := outage(error)) is None or self._drain.wish == "now":
                    raise
                log.warning("the database is away, the result waits for it: %s", why)
                time.sleep(delay)
                delay = min(delay * 2, 10)

    def _clean(self, claim: Claim, folder: Path, status: Status | None) -> None:
        """Keep checkpoints for a next attempt, which may run by now; drop everything once the job is over."""
        if status is not None and status.is_terminal:
            shutil.rmtree(folder.parent, ignore_errors=True)
            try:
                self._artifacts.remove(f"jobs/{claim.job_id}/checkpoints")
            except (ArtifactError, ServiceUnreachable) as error:
                log.warning("job %s: its checkpoints stay for loractl gc: %s", claim.job_id, error.sentence)
            return
        shutil.rmtree(folder / "keeping", ignore_errors=True)
        if not (folder / READY).exists():
            shutil.rmtree(folder / "result", ignore_errors=True)

    def _environment(self, claim: Claim) -> dict[str, str]:
        """The trainer's: its device alone, its share of the cores, and no address or password of a service."""
        # of AWS's and PostgreSQL's variables any may be a key, a password, or the place of one
        addresses = ("LORACTL_DATABASE_URL", "LORACTL_REDIS_URL", "LORACTL_ARTIFACTS_URL")
        hidden = (*addresses, "AWS_", "PG")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        return {
            **kept,
            **self._device.environment(),
            JOB_VARIABLE: str(claim.job_id),
            CARD_VARIABLE: card_mark(self._settings, self._node),
            RUN_VARIABLE: run_mark(claim.token),
            "OMP_NUM_THREADS": str(self._threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }


def _take_all(told: queue.SimpleQueue[Told | str], state: _State, timeout: float = 0.0) -> None:
    """Fold what the trainer has told since the last look into the state."""
    while True:
        try:
            message = told.get(timeout=timeout) if timeout else told.get_nowait()
        except queue.Empty:
            return
        timeout, state.heard = 0.0, time.monotonic()
        if isinstance(message, str):
            state.log.put(message)
            continue
        if isinstance(message, (Stepped, Ended)) and message.peaks is not None:
            state.peaks = state.peaks.above(message.peaks)
        if isinstance(message, Ended):
            state.ended = message
            continue
        if isinstance(message, Saved):
            state.saved.append(message)
            continue
        if isinstance(message, Stepped):
            state.step = message.step
            _say(message, state)
        elif isinstance(message, Adjusted):
            state.adjustment = message.adjustment
        elif isinstance(message, Note) and message.kind == "memory":
            state.changes.append(message.text)
        state.pending = _fold(state.pending, message)


def _say(message: Stepped, state: _State) -> None:
    now = time.monotonic()
    if "loss" not in message.metrics or (now - state.said < SAY_EVERY_S and message.step < message.total_steps):
        return
    state.said = now
    loss = message.metrics["loss"]
    log.info("job %s: step %s of %s, loss %.3f", message.job_id, message.step, message.total_steps, loss)


def _rung_reached(claim: Claim, state: _State) -> int:
    """The step of a rung that the next heartbeat tells, 0 without one: a loser's steps until then are in vain."""
    return max((point.step for point in rung_points(claim, state.pending)), default=0)


def _hand_on(state: _State, keeper: CheckpointKeeper) -> None:
    """Pass new checkpoints on to the artifact store."""
    for saved in state.saved:
        keeper.offer(Path(saved.path), saved.step)
    state.saved = []


def mark_ready(folder: Path, claim: Claim, message: str) -> None:
    """Note that a result is complete: a later attempt on this box need not train again, should storing fail."""
    ready = {"belongs_to": _asked(claim), "message": message, "files": _hashes(folder / "result")}
    (folder / READY).write_text(json.dumps(ready), "utf-8")


def ready_result(folder: Path, claim: Claim) -> str | None:
    """What a finished result of the same job says of itself; None without one.

    Its files are as they were: a box that lost its power may have kept the note and not all of them.
    """
    try:
        ready = json.loads((folder / READY).read_text("utf-8"))
        found = _hashes(folder / "result")
    except (OSError, ValueError):
        return None
    files: dict[str, str] = ready.get("files") or {"": ""}  # an older note names none: it may be torn
    whole = all(found.get(name) == digest for name, digest in files.items())
    message: str = ready.get("message", "")
    return message if ready.get("belongs_to") == _asked(claim) and whole else None


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a result."""
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _asked(claim: Claim) -> list[str]:
    """What a result answers to: the spec, the method and the data."""
    hashes = [stored["sha256"] for _, stored in sorted(claim.data.items())]
    return [claim.spec.spec_hash(), claim.method.value, *hashes]


def _lighter(start: Start, state: _State) -> Adjustment | None:
    """How a next trainer may go on after this one's end; None when none shall.

    What did not fit before or after the training itself would not fit with smaller pieces of its batch either: before,
    the trainer has tried them all.
    """
    if state.forced is not None or state.lease_lost or state.ended is None:
        return None
    if state.ended.reason is not Reason.OUT_OF_MEMORY or state.pending.stage is not Stage.TRAINING:
        return None
    return next_adjustment(start.spec, state.adjustment, on_gpu=start.device == "cuda")


def _fold(progress: Progress, message: Told) -> Progress:
    if isinstance(message, StageChanged):
        return replace(progress, stage=message.stage)
    if isinstance(message, Note):
        if message.kind != "saved":  # as often as the job file says
            log.info("job %s: %s", message.job_id, message.text)
        events = (*progress.events, (message.kind, message.text))
        return replace(
            progress, events=events, resumed_from_step=message.resumed_from_step or progress.resumed_from_step
        )
    if isinstance(message, Adjusted):
        return replace(progress, adjustment=message.adjustment)
    if isinstance(message, Planned):
        return replace(progress, need=Need(lora=message.lora, qlora=message.qlora))
    assert isinstance(message, Stepped)
    metrics = tuple((message.step, name, value) for name, value in message.metrics.items())
    return replace(
        progress,
        step=message.step,
        total_steps=message.total_steps,
        metrics=progress.metrics + metrics,
        loss=message.metrics.get("loss", progress.loss),
        eta_seconds=message.eta_seconds,
        eta_spread_seconds=message.eta_spread_seconds,
        tokens_per_second=message.tokens_per_second or progress.tokens_per_second,
    )


def _explain(error: Exception) -> tuple[Reason, str]:
    """The reason for what failed on our own side, outside the trainer."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return (
            Reason.DISK_FULL if full else Reason.TRAINER_ERROR
        ), f"{error.strerror or error}: {error.filename or ''}".strip(": ")
    if isinstance(error, (ArtifactError, ServiceUnreachable)):
        return Reason.STORE_FAILED, error.sentence
    if isinstance(error, Refused):
        return Reason.BAD_SPEC, error.sentence
    return Reason.TRAINER_ERROR, str(error)
