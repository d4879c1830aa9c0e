"""The trainers of one attempt, watched: one to the end, or another with less after out-of-memory."""

from __future__ import annotations

import logging
import queue
from dataclasses import replace
from pathlib import Path

from loractl.common.job.adjustment import Adjustment, in_words, next_adjustment
from loractl.common.job.method import Parallel
from loractl.common.job.status import Reason, Stage
from loractl.common.store.records import Claim
from loractl.common.units import gib
from loractl.worker.allowance import kernel_kills, kernel_kills_since
from loractl.worker.device.occupancy import end_leftovers, run_mark
from loractl.worker.protocol.exit_reason import exit_reason
from loractl.worker.protocol.messages import Ended, Start, Told

from .attempt import SupervisedAttempt
from .checkpoint_upload import CheckpointUpload
from .log import LOG_FILE, opened
from .order import environment
from .stops import ask_to_stop, beat, must_be_killed, wanted_stop
from .trainer_process import ChildProcess, TrainerProcess
from .workplace import STOP_SHARE, Workplace

log = logging.getLogger("loractl.worker")

CHECKPOINT_GRACE_S = 60.0
"""Seconds that the last checkpoint has to reach the artifact store after a training's end: another box may need it."""

LOOK_S = 0.2
"""Seconds between two looks at a silent trainer."""

LEFT_S = 20.0
"""Seconds that a trainer's memory may stay on the card after its end: the driver takes a moment to free it."""


def train(place: Workplace, attempt: SupervisedAttempt, start: Start) -> None:
    """Run a trainer to its end. If it runs out of memory in mid-training, run another one that needs less.

    Only a new process has unfragmented memory again; it continues from the newest checkpoint of the attempt.
    """
    attempt.own.began = attempt.own.began or place.clock.now()
    upload = CheckpointUpload(place.artifacts, place.store, attempt.claim, attempt.folder / "keeping", place.clock)
    order = start
    try:
        for _ in range(1 + _rungs(start)):
            _run(place, attempt, order, upload)
            lighter = _lighter(attempt, order)
            if lighter is None or not _may_restart(place, attempt):
                break
            order = lighter
        else:  # a trainer may run a stranger's code, and ask for this for ever
            message = "memory ran out again after each step down"
            attempt.heard.ended = Ended(job_id=start.job_id, reason=Reason.OUT_OF_MEMORY, message=message)
    finally:
        # no one needs the last checkpoint of a training that is done, cancelled, pruned or no longer ours
        over = attempt.own.lease_lost or attempt.wishes.cancel_requested
        over = over or attempt.verdict()[0] in (Reason.OK, Reason.PRUNED)
        _close(place, attempt, upload, 0.0 if over or place.drain.wish == "now" else _patience_s(place, attempt))


def _patience_s(place: Workplace, attempt: SupervisedAttempt) -> float:
    """For the last checkpoint: in a bounded stop, all that the trainer has left of it."""
    drain, kill_at = place.drain, attempt.own.kill_at
    if drain.wish is None or drain.grace_s is None or kill_at is None:
        return CHECKPOINT_GRACE_S
    return max(0.0, kill_at - place.clock.now() + (1 - STOP_SHARE) * drain.grace_s)


def _run(place: Workplace, attempt: SupervisedAttempt, start: Start, upload: CheckpointUpload) -> None:
    """Start a trainer, and watch it until the job has ended there."""
    kills, claim = kernel_kills(), attempt.claim
    with opened(attempt.folder / LOG_FILE) as log_file:
        process = _launch(place, attempt, start)
        trainer = TrainerProcess(process, claim.job_id, run_mark(claim.token), log_file, attempt.unwritten.log)
        attempt.own.trainer, attempt.own.pids = trainer, attempt.own.pids | {trainer.pid}
        try:
            trainer.send(start)
            _watch(place, attempt, trainer, upload)
        finally:
            trainer.end()
            attempt.own.trainer = None
    _take_all(trainer.told, attempt)
    _hand_on(attempt, upload)
    if attempt.heard.end is None and attempt.own.forced is None and not attempt.own.lease_lost:
        killed, printed, on_card = kernel_kills_since(kills), attempt.unwritten.log.end(), start.device == "cuda"
        limited = not on_card and start.memory_limit is not None
        why = exit_reason(trainer.returncode, printed, kernel_kills=killed, limited=limited, on_card=on_card)
        attempt.heard.ended = Ended(job_id=start.job_id, **why)
        attempt.heard.wordless = True


def _launch(place: Workplace, attempt: SupervisedAttempt, start: Start) -> ChildProcess:
    """A fork of a process that has done the imports, or a new process."""
    own = environment(place, attempt.claim)
    attempt.say(Stage.PREPARING, f"starts the trainer on {place.node}")
    forked = None
    if place.forks is not None and not start.ranks:  # a leading rank starts others
        forked = place.forks.fork(own, lambda why: attempt.say(Stage.PREPARING, why))
    return forked or place.launch(place.settings.trainer, own)


def _watch(place: Workplace, attempt: SupervisedAttempt, trainer: TrainerProcess, upload: CheckpointUpload) -> None:
    """Pass on the trainer's messages and people's requests, until it has ended or must be killed."""
    next_beat, stage, rung, attempt.heard.at = 0.0, None, 0, place.clock.now()
    while trainer.poll() is None and attempt.heard.end is None:
        _take_all(trainer.told, attempt, timeout=LOOK_S)
        _hand_on(attempt, upload)
        attempt.turn()
        reached, now = attempt.rung_reached(), place.clock.now()
        if now >= next_beat or attempt.unwritten.pending.stage != stage or reached > rung:
            stage, rung, next_beat = attempt.unwritten.pending.stage, max(rung, reached), now + place.beat_s
            beat(place, attempt)
        if must_be_killed(place, attempt):
            return
        if attempt.heard.end is None and (wish := wanted_stop(place, attempt)) is not None:
            ask_to_stop(attempt, wish)


def _lighter(attempt: SupervisedAttempt, start: Start) -> Start | None:
    """The order for a next trainer that needs less, after out-of-memory; None if no other may help.

    The trainer itself asks for it, or has ended by it without a word, as a library or a limit ends a process.
    """
    heard, cards = attempt.heard, max(1, len(start.ranks))
    if attempt.own.forced is not None or attempt.own.lease_lost:
        return None
    if heard.again is not None and heard.ended is None:
        lighter, text = heard.again.adjustment, heard.again.change
    elif (found := _next_adjustment(attempt, start)) is not None:
        where = f"at step {heard.step}"
        lighter, text = found, in_words(start.spec, heard.adjustment, found, where=where, then="restarts", cards=cards)
    else:
        return None
    if text not in heard.changes:  # else the trainer has told it
        log.info("job %s: %s", attempt.claim.job_id, text)
        heard.changes.append(text)
        attempt.unwritten.note("memory", text)
    attempt.unwritten.pending = replace(attempt.unwritten.pending, adjustment=lighter)
    changes = [*start.changes, *heard.changes]
    heard.adjustment, heard.ended, heard.again, heard.changes = lighter, None, None, []
    heard.loaded = heard.wordless = False
    return start.model_copy(update={"adjustment": lighter, "changes": changes})


def _next_adjustment(attempt: SupervisedAttempt, start: Start) -> Adjustment | None:
    """Whether a finer split of the batch may help. It does not for out-of-memory before or after the training itself:
    before it, the trainer has tried all splits, unless a try of the longest batches has ended it. Ranks that divide a
    base are out of step after the first try."""
    ended, died_trying = attempt.heard.ended, attempt.heard.wordless and attempt.heard.loaded
    early = start.parallel is Parallel.SHARDED or died_trying
    tries = (Stage.PREPARING, Stage.TRAINING) if early else (Stage.TRAINING,)
    if ended is None or ended.reason is not Reason.OUT_OF_MEMORY or attempt.unwritten.pending.stage not in tries:
        return None
    return _step_down(start, attempt.heard.adjustment)


def _step_down(start: Start, adjustment: Adjustment) -> Adjustment | None:
    return next_adjustment(start.spec, adjustment, on_gpu=start.device == "cuda", cards=max(1, len(start.ranks)))


def _rungs(start: Start) -> int:
    """How often the job can be made smaller."""
    rungs, adjustment = 0, _step_down(start, start.adjustment)
    while adjustment is not None:
        rungs, adjustment = rungs + 1, _step_down(start, adjustment)
    return rungs


def _may_restart(place: Workplace, attempt: SupervisedAttempt) -> bool:
    """Wait until nothing of the last trainer is left on the device. False: it does not go, or the job is to stop."""
    deadline = place.clock.now() + LEFT_S
    while True:
        beat(place, attempt)
        if attempt.own.lease_lost:
            return False
        if (wish := wanted_stop(place, attempt)) is not None:
            attempt.own.forced = wish.reason, wish.message
            return False
        if (left := left_of(place, attempt.claim)) is None:
            return True
        if place.clock.now() > deadline:
            reason = Reason.GPU_ERROR if place.device.trains_on == "cuda" else Reason.TRAINER_ERROR
            attempt.own.forced = reason, f"its ended trainer left {left} behind"
            return False
        place.clock.sleep(LOOK_S)


def left_of(place: Workplace, claim: Claim) -> str | None:
    """Kill what the attempt's trainers have left; what is still there, in words, or None."""
    if alive := end_leftovers(run_mark(claim.token)):
        return f"process {alive[0]}"
    held = place.held(claim.job_id)
    return f"{gib(held)} GiB of memory" if held else None


def _close(place: Workplace, attempt: SupervisedAttempt, upload: CheckpointUpload, patience_s: float) -> None:
    """Wait at most this long for the last checkpoint to be stored, and keep the lease."""
    upload.close()
    deadline = place.clock.now() + patience_s
    while not upload.done(min(place.beat_s, max(0.0, deadline - place.clock.now()))):
        if attempt.own.lease_lost or attempt.wishes.cancel_requested or upload.silent or place.clock.now() >= deadline:
            return
        beat(place, attempt)


def _take_all(told: queue.SimpleQueue[Told], attempt: SupervisedAttempt, timeout: float = 0.0) -> None:
    """Fold the trainer's messages since the last look into the attempt."""
    while True:
        try:
            message = attempt.clock.get(told, timeout) if timeout else told.get_nowait()
        except queue.Empty:
            return
        timeout = 0.0
        attempt.hear(message)


def _hand_on(attempt: SupervisedAttempt, upload: CheckpointUpload) -> None:
    """Pass new checkpoints on to the artifact store."""
    for saved in attempt.heard.saved:
        upload.offer(Path(saved.path), saved.step)
    attempt.heard.saved = []
