"""The trainers of one attempt, watched: one to the end, or another with less after out-of-memory."""

from __future__ import annotations

import logging
import queue
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from loractl.common.job.adjustment import Adjustment, in_words, next_adjustment
from loractl.common.job.status import Reason, Stage
from loractl.worker.device.occupancy import RUN_VARIABLE
from loractl.worker.protocol.exit_reason import exit_reason
from loractl.worker.protocol.messages import Ended, Release, Start, Told
from loractl.worker.protocol.spare import PLACEHOLDER, PLACEHOLDER_VALUE

from .checkpoint_upload import CheckpointUpload
from .heartbeat import beat, while_beating
from .log import LOG_FILE
from .order import common_environment, environment
from .process import Leave, launch, running, send
from .state import AttemptState
from .stops import Interrupted, ask_to_stop, must_leave, wanted_stop
from .workplace import HostSource, StayingTrainer, Workplace

log = logging.getLogger("loractl.worker")

CHECKPOINT_GRACE_S = 60.0
"""Seconds that the last checkpoint has to reach the artifact store after a training's end: another box may need it."""

LOOK_S = 0.2
"""Seconds between two looks at a trainer that says nothing."""


def train(place: Workplace, state: AttemptState, start: Start) -> None:
    """Run a trainer to its end. If it runs out of memory in mid-training, run another one that needs less.

    Only a new process has unbroken memory again; it goes on from the last checkpoint.
    """
    state.began = time.monotonic()
    upload = CheckpointUpload(place.artifacts, place.store, state.claim, state.folder / "keeping")
    order: Start | None = start
    try:
        while order is not None:
            _run(place, state, order, upload)
            order = _lighter(state, order)
    finally:
        # no one needs the last one of a training that is done, cancelled, pruned or no longer ours
        over = state.lease_lost or state.cancel_requested or state.verdict()[0] in (Reason.OK, Reason.PRUNED)
        _close(place, state, upload, 0.0 if over or place.drain.wish == "now" else CHECKPOINT_GRACE_S)


def _run(place: Workplace, state: AttemptState, start: Start, upload: CheckpointUpload) -> None:
    """Start a trainer and stay with it until it has ended, or has left the job."""
    own = environment(place, state.claim)
    process, leave = _trainer(place, state, start, own)
    try:
        with (
            (state.folder / LOG_FILE).open("a", encoding="utf-8") as log_file,
            running(process, own[RUN_VARIABLE], start, log_file, state.log, leave) as (trainer, told),
        ):
            state.trainer, state.pids = trainer, state.pids | {trainer.pid}
            assert trainer.stdin
            send(trainer.stdin, start)
            _watch(place, state, trainer, told, upload)
            if leave is not None and _may_stay(place, state):
                leave.asked = True
                send(trainer.stdin, Release(job_id=start.job_id, mark=leave.mark))
        state.trainer = None
        _keep(place, state, start, leave, process)
    finally:
        if place.hosts is not None and leave is not None and not leave.done:
            place.hosts.drop_mark(leave.mark)
    _take_all(told, state)
    _hand_on(state, upload)
    if state.ended is None and state.forced is None and not state.lease_lost:
        on_card = start.device == "cuda"
        limited = not on_card and start.memory_limit is not None
        why = exit_reason(trainer.returncode, state.log.end(), limited=limited, on_card=on_card)
        state.ended = Ended(job_id=start.job_id, **why)


def _trainer(
    place: Workplace, state: AttemptState, start: Start, own: dict[str, str]
) -> tuple[subprocess.Popen[str], Leave | None]:
    """The host with the job's base, the spare trainer, or a new one; and how it may leave the job and stay.

    Raises Interrupted where a base that must go does not.
    """
    hosts, claim = place.hosts, state.claim
    if hosts is not None:
        _make_room(place, state, hosts)
        if start.keep is None and claim.host is not None:
            hosts.let_go([claim.host])  # the base runs code of its own, which no claim can know
        elif claim.host is not None and (host := hosts.take(claim, own)) is not None:
            state.say(Stage.PREPARING, f"goes on in the trainer on {place.node} that has its base")
            return host, Leave(mark=claim.host)
        _make_room(place, state, hosts)
    state.say(Stage.PREPARING, f"starts the trainer on {place.node}")
    leave = None if hosts is None or start.keep is None else Leave(mark=hosts.draw_mark())
    spare = None if place.spares is None or start.ranks else place.spares.take(own)  # one that leads starts others
    if spare is not None:
        return spare, leave
    room = {} if leave is None else {PLACEHOLDER: PLACEHOLDER_VALUE}  # the last, so that its marks can change
    return launch(place.settings.trainer, {**own, **room}), leave


def _make_room(place: Workplace, state: AttemptState, hosts: HostSource) -> None:
    """Nothing starts on the card before the bases that must go have gone."""
    if hosts.in_the_way and (why := while_beating(place, state, hosts.make_room)) is not None:
        state.forced = Reason.GPU_ERROR, why
        raise Interrupted


def _may_stay(place: Workplace, state: AttemptState) -> bool:
    """Whether a trainer that has told the job's end may wait for the next job with its base."""
    wanted = place.drain.wish is None and not state.lease_lost
    return wanted and state.ended is not None and state.ended.base_bytes is not None


def _keep(
    place: Workplace, state: AttemptState, start: Start, leave: Leave | None, process: subprocess.Popen[str]
) -> None:
    """Hand a trainer that has left the job to who keeps it."""
    if leave is None or not leave.done:
        return
    assert place.hosts is not None and start.keep is not None and state.ended is not None
    size = state.ended.base_bytes or 0
    staying = StayingTrainer(
        process=process, mark=leave.mark, key=start.keep, bytes=size, environment=common_environment(place)
    )
    leave.done = place.hosts.keep(staying, state.claim)


def _watch(
    place: Workplace,
    state: AttemptState,
    trainer: subprocess.Popen[str],
    told: queue.SimpleQueue[Told | str],
    upload: CheckpointUpload,
) -> None:
    """Pass on what the trainer tells and what people wish, until it has ended or must be given up."""
    next_beat, stage, rung, state.heard_at = 0.0, None, 0, time.monotonic()
    while trainer.poll() is None and state.ended is None:
        _take_all(told, state, timeout=LOOK_S)
        _hand_on(state, upload)
        state.turn()
        reached = state.rung_reached()
        if time.monotonic() >= next_beat or state.pending.stage != stage or reached > rung:
            stage, rung, next_beat = state.pending.stage, max(rung, reached), time.monotonic() + place.beat_s
            beat(place, state)
        if must_leave(place, state):
            return
        if (wish := wanted_stop(place, state)) is not None:
            ask_to_stop(state, wish)


def _lighter(state: AttemptState, start: Start) -> Start | None:
    """The order of a next trainer that needs less, after out-of-memory; None when no other one may help."""
    lighter = _next_adjustment(state, start)
    if lighter is None:
        return None
    text = in_words(start.spec, state.adjustment, lighter, where=f"at step {state.step}", then="starts again")
    log.info("job %s: %s", state.claim.job_id, text)
    events = (*state.pending.events, ("memory", text))
    state.pending = replace(state.pending, adjustment=lighter, events=events)
    changes = [*start.changes, *state.changes, text]
    state.adjustment, state.ended, state.changes = lighter, None, []
    return start.model_copy(update={"adjustment": lighter, "changes": changes})


def _next_adjustment(state: AttemptState, start: Start) -> Adjustment | None:
    """Whether smaller pieces of the batch may help. Out of memory before or after the training itself they do not:
    before, the trainer has tried them all."""
    if state.forced is not None or state.lease_lost or state.ended is None:
        return None
    if state.ended.reason is not Reason.OUT_OF_MEMORY or state.pending.stage is not Stage.TRAINING:
        return None
    return next_adjustment(start.spec, state.adjustment, on_gpu=start.device == "cuda")


def _close(place: Workplace, state: AttemptState, upload: CheckpointUpload, patience_s: float) -> None:
    """Wait so long for the last checkpoint to be stored, and keep the lease meanwhile."""
    upload.close()
    deadline = time.monotonic() + patience_s
    while not upload.done(min(place.beat_s, max(0.0, deadline - time.monotonic()))):
        if state.lease_lost or state.cancel_requested or upload.silent or time.monotonic() >= deadline:
            return
        beat(place, state)


def _take_all(told: queue.SimpleQueue[Told | str], state: AttemptState, timeout: float = 0.0) -> None:
    """Fold what the trainer has told since the last look into the state."""
    while True:
        try:
            message = told.get(timeout=timeout) if timeout else told.get_nowait()
        except queue.Empty:
            return
        timeout = 0.0
        state.hear(message)


def _hand_on(state: AttemptState, upload: CheckpointUpload) -> None:
    """Pass new checkpoints on to the artifact store."""
    for saved in state.saved:
        upload.offer(Path(saved.path), saved.step)
    state.saved = []
