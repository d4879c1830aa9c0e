"""The trainers of one attempt, watched: one to the end, or another with less after out-of-memory."""

from __future__ import annotations

import contextlib
import logging
import queue
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import IO

from loractl.common.job.adjustment import Adjustment, in_words, next_adjustment
from loractl.common.job.method import Parallel
from loractl.common.job.status import Reason, Stage
from loractl.common.store.database import REFUSALS, told_by
from loractl.worker.allowance import kernel_kills, kernel_kills_since
from loractl.worker.device.occupancy import RUN_VARIABLE
from loractl.worker.protocol.exit_reason import exit_reason
from loractl.worker.protocol.idle_trainer import PLACEHOLDER, PLACEHOLDER_VALUE
from loractl.worker.protocol.messages import Ended, Start, Told

from .attempt import SupervisedAttempt
from .checkpoint_upload import CheckpointUpload
from .log import LOG_FILE, opened
from .order import common_environment, environment
from .stops import (
    Interrupted,
    ask_to_stop,
    beat,
    closes_now,
    does_not_leave,
    must_leave,
    require_wanted,
    wanted_stop,
    while_beating,
)
from .trainer_process import TrainerLink, TrainerProcess
from .workplace import STOP_SHARE, HostSource, StayingTrainer, Workplace

log = logging.getLogger("loractl.worker")

CHECKPOINT_GRACE_S = 60.0
"""Seconds that the last checkpoint has to reach the artifact store after a training's end: another box may need it."""

JOIN_S = 15.0
"""Seconds within which a trainer takes a job that joins it, even if its last job is just leaving."""

LEAVING_S = 40.0
"""Most seconds that a job on several cards waits for bases on the other cards: until a node looks, and then acts."""

LOOK_S = 0.2
"""Seconds between two looks at a silent trainer."""


def train(place: Workplace, attempt: SupervisedAttempt, start: Start) -> None:
    """Run a trainer to its end. If it runs out of memory in mid-training, run another one that needs less.

    Only a new process has unfragmented memory again; it continues from the last checkpoint.
    """
    attempt.run.began = attempt.run.began or place.clock.now()
    upload = CheckpointUpload(place.artifacts, place.store, attempt.claim, attempt.folder / "keeping", place.clock)
    order: Start | None = start
    try:
        while order is not None:
            _run(place, attempt, order, upload)
            order = _lighter(attempt, order)
    finally:
        # no one needs the last checkpoint of a training that is done, cancelled, pruned or no longer ours
        over = attempt.own.lease_lost or attempt.wishes.cancel_requested or attempt.own.gone_as is not None
        over = over or attempt.verdict()[0] in (Reason.OK, Reason.PRUNED)
        _close(place, attempt, upload, 0.0 if over or place.drain.wish == "now" else _patience_s(place, attempt))


def _patience_s(place: Workplace, attempt: SupervisedAttempt) -> float:
    """For the last checkpoint: in a bounded stop, all that the trainer has left of it."""
    drain, kill_at = place.drain, attempt.own.kill_at
    if drain.wish is None or drain.grace_s is None or kill_at is None:
        return CHECKPOINT_GRACE_S
    return max(0.0, kill_at - place.clock.now() + (1 - STOP_SHARE) * drain.grace_s)


def _run(place: Workplace, attempt: SupervisedAttempt, start: Start, upload: CheckpointUpload) -> None:
    """Put the job into a trainer, and watch it until it has ended there."""
    kills = kernel_kills()
    with opened(attempt.folder / LOG_FILE) as log_file:
        link = attempt.run.trainer = _link(place, attempt, start, log_file)
        trainer, end = link.trainer, False
        attempt.run.pids |= {link.pid}
        try:
            link.send(start)
            end = _watch(place, attempt, link, start, upload)
        finally:
            trainer.leave(link, stay=_may_stay(place, attempt, trainer), end=end)
            attempt.run.host, attempt.run.trainer, attempt.run.stayed = link.host, None, trainer.stays
            if trainer.stays:
                _keep(place, attempt, start, trainer)
            if trainer.over and place.hosts is not None and trainer.mark:
                place.hosts.drop_mark(trainer.mark)
    _take_all(link.told, attempt)
    _hand_on(place, attempt, link, upload)
    _tell_of_spoilt(place, trainer)
    if attempt.heard.ended is None and attempt.own.forced is None and not attempt.own.lease_lost:
        attempt.heard.ended = _unexpected_end(attempt, start, trainer, kernel_kills_since(kills))
    attempt.run.goes_on_alone = start.joins or not (trainer.over or trainer.stays)


def _unexpected_end(attempt: SupervisedAttempt, start: Start, trainer: TrainerProcess, kills: int | None) -> Ended:
    """Why a trainer ended without a message about the job. `kills`: by the kernel, since the job joined."""
    on_card = start.device == "cuda"
    limited = not on_card and start.memory_limit is not None
    printed = [*trainer.end(), *attempt.unwritten.log.end()]
    why = exit_reason(trainer.process.returncode, printed, kernel_kills=kills, limited=limited, on_card=on_card)
    if trainer.lost > 1:
        other = "another job" if trainer.lost == 2 else f"{trainer.lost - 1} other jobs"
        why = {"reason": Reason.HOST_LOST, "message": f"it shared its trainer with {other}: {why['message']}"}
    return Ended(job_id=start.job_id, **why)


def _link(place: Workplace, attempt: SupervisedAttempt, start: Start, log_file: IO[str]) -> TrainerLink:
    """A place in the trainer that the claim names, or in the attempt's own. Raises Interrupted."""
    own = environment(place, attempt.claim)
    if start.joins:
        return _joined(place, attempt, own, log_file)
    process, mark = _trainer(place, attempt, start, own)
    return TrainerProcess(process, own[RUN_VARIABLE], mark, place.clock).begin(
        start.job_id, log_file, attempt.unwritten.log
    )


def _joined(place: Workplace, attempt: SupervisedAttempt, own: dict[str, str], log_file: IO[str]) -> TrainerLink:
    """A place in a trainer that has the base, and has or just had other jobs. Raises Interrupted if it is gone."""
    hosts, claim, deadline, next_beat = place.hosts, attempt.claim, place.clock.now() + JOIN_S, 0.0
    while hosts is not None and claim.host is not None and place.clock.now() < deadline:
        trainer = hosts.with_jobs(claim.host)
        link = None if trainer is None else trainer.join(claim.job_id, log_file, attempt.unwritten.log)
        if link is None and (process := hosts.take(claim, own)) is not None:
            trainer = TrainerProcess(process, own[RUN_VARIABLE], claim.host, place.clock)
            link = trainer.begin(claim.job_id, log_file, attempt.unwritten.log)
            hosts.let_in(trainer)  # its row says already that others may join
        if link is not None:
            attempt.say(Stage.PREPARING, f"joins the trainer on {place.node} that has its base")
            return link
        if not hosts.knows(claim.host):
            break
        if trainer is not None and (why := _refusal(trainer, claim.job_id)) is not None:
            attempt.own.forced = Reason.HOST_LOST, why
            raise Interrupted
        if place.clock.now() >= next_beat:
            next_beat = place.clock.now() + place.beat_s
            beat(place, attempt)
            require_wanted(place, attempt)
        hosts.await_change(LOOK_S)  # its last job is leaving
    attempt.own.forced = Reason.HOST_LOST, "the trainer that it was about to join has ended"
    raise Interrupted


def _refusal(trainer: TrainerProcess, job_id: int) -> str | None:
    """Why a trainer with jobs does not take this one, now or soon; None: its last job is leaving it."""
    if trainer.holds(job_id):
        return "its earlier attempt has not left the trainer that it was about to join"
    return (
        None
        if trainer.spoilt is None
        else f"the trainer that it was about to join takes no more jobs: {trainer.spoilt}"
    )


def _trainer(
    place: Workplace, attempt: SupervisedAttempt, start: Start, own: dict[str, str]
) -> tuple[subprocess.Popen[str], str]:
    """The host with the job's base, the spare trainer, or a new one; and the mark by which it may stay, or nothing.

    Raises Interrupted if a base that must go does not.
    """
    hosts, claim = place.hosts, attempt.claim
    _await_other_cards(place, attempt)
    if hosts is not None:
        _make_room(place, attempt, hosts)
        if start.keep is None and claim.host is not None:
            hosts.let_go([claim.host])  # the base runs its own code, which no claim can know
        elif claim.host is not None and (host := hosts.take(claim, own)) is not None:
            attempt.say(Stage.PREPARING, f"continues in the trainer on {place.node} that has its base")
            return host, claim.host
        _make_room(place, attempt, hosts)
    attempt.say(Stage.PREPARING, f"starts the trainer on {place.node}")
    mark = "" if hosts is None or start.keep is None else hosts.draw_mark()
    spare = None if place.spares is None or start.ranks else place.spares.take(own)  # a leading rank starts others
    if spare is not None:
        return spare, mark
    room = {PLACEHOLDER: PLACEHOLDER_VALUE} if mark else {}  # the last, so that its marks can change
    return place.launch(place.settings.trainer, {**own, **room}), mark


def _make_room(place: Workplace, attempt: SupervisedAttempt, hosts: HostSource) -> None:
    """Nothing starts on the card until the bases that must go are gone."""
    if hosts.in_the_way and (why := while_beating(place, attempt, hosts.make_room)) is not None:
        attempt.own.forced = Reason.GPU_ERROR, why
        raise Interrupted


def _await_other_cards(place: Workplace, attempt: SupervisedAttempt) -> None:
    """The same on the job's other cards: their nodes are woken, and end the bases that its claim sent away. A base that
    can't be ended closes its card, and then the job does not wait for it."""
    others = [share.node for share in attempt.claim.shares[1:]]

    def leave() -> None:
        deadline, woken = place.clock.now() + LEAVING_S, set[str]()
        while place.clock.now() < deadline:
            with contextlib.suppress(*REFUSALS):  # the database is down
                waited_for = {node for node in others if any(row.leaving for row in place.store.hosts.of_card(node))}
                if not waited_for:
                    return
                place.wake_others(waited_for - woken)
                woken |= waited_for
            place.clock.sleep(LOOK_S)

    if others:
        while_beating(place, attempt, leave)


def _may_stay(place: Workplace, attempt: SupervisedAttempt, trainer: TrainerProcess) -> bool:
    """Whether a trainer whose last job has ended may wait for the next one with its base."""
    wanted = (
        place.hosts is not None and place.drain.wish is None and not attempt.own.lease_lost and trainer.spoilt is None
    )
    return wanted and attempt.heard.ended is not None and trainer.base_bytes is not None


def _keep(place: Workplace, attempt: SupervisedAttempt, start: Start, trainer: TrainerProcess) -> None:
    """Hand over a trainer without a job to its keeper."""
    assert place.hosts is not None and start.keep is not None
    staying = StayingTrainer(
        process=trainer.process,
        mark=trainer.mark,
        key=start.keep,
        bytes=trainer.base_bytes or 0,
        environment=common_environment(place),
    )
    trainer.over = not place.hosts.keep(staying, attempt.claim)


def _watch(
    place: Workplace, attempt: SupervisedAttempt, link: TrainerLink, start: Start, upload: CheckpointUpload
) -> bool:
    """Pass on the trainer's messages and people's requests, until the job has ended there. True: it must be killed."""
    next_beat, next_close, stage, rung, attempt.heard.at = 0.0, 0.0, None, 0, place.clock.now()
    while link.poll() is None and not _is_over(attempt, link):
        _take_all(link.told, attempt, timeout=LOOK_S)
        _open(place, attempt, link, start)
        _hand_on(place, attempt, link, upload)
        attempt.turn()
        reached = attempt.rung_reached()
        if place.clock.now() >= next_beat or attempt.unwritten.pending.stage != stage or reached > rung:
            stage, rung, next_beat = (
                attempt.unwritten.pending.stage,
                max(rung, reached),
                place.clock.now() + place.beat_s,
            )
            beat(place, attempt)
            _tell_of_spoilt(place, link.trainer)
        if must_leave(place, attempt):
            return True
        if attempt.heard.ended is None and (wish := wanted_stop(place, attempt)) is not None:
            ask_to_stop(attempt, wish)
        if closes_now(attempt) and place.clock.now() >= next_close:
            next_close = place.clock.now() + place.beat_s
            _close_row(place, attempt)
        if does_not_leave(attempt):
            link.trainer.spoil(f"job {attempt.claim.job_id} does not leave it")
    return False


def _close_row(place: Workplace, attempt: SupervisedAttempt) -> None:
    """End the attempt in its row while the job is leaving a trainer that others need. If the database does not take
    that now, it is tried again, at the latest when the job is out."""
    assert attempt.own.forced is not None
    try:
        status = place.store.attempts.finish(
            attempt.claim, *attempt.own.forced, attempt.unwritten.progress(attempt.heard.peaks, last=True), inside=True
        )
    except REFUSALS as error:
        log.warning("job %s: its row is closed later: %s", attempt.claim.job_id, told_by(error))
        return
    attempt.own.gone_as, attempt.own.lease_lost = status, status is None
    if status is not None:
        log.info("job %s: %s: %s; it leaves its trainer", attempt.claim.job_id, status.value, attempt.own.forced[1])


def _tell_of_spoilt(place: Workplace, trainer: TrainerProcess) -> None:
    """Keep claims from naming a trainer that takes no more jobs."""
    if place.hosts is not None and trainer.spoilt is not None and not trainer.over:
        place.hosts.spoil(trainer.mark, trainer.spoilt)


def _is_over(attempt: SupervisedAttempt, link: TrainerLink) -> bool:
    """Whether the job has ended and left a trainer that continues."""
    return attempt.heard.ended is not None and (link.alone or link.left.is_set())


def _open(place: Workplace, attempt: SupervisedAttempt, link: TrainerLink, start: Start) -> None:
    """Let others join the trainer once it reports that they may."""
    opened, attempt.heard.opened = attempt.heard.opened, None
    if opened is None or place.hosts is None or not link.trainer.mark or start.keep is None:
        return
    if attempt.claim.packs:
        place.hosts.open(link.trainer, attempt.claim, start.keep, opened.base_bytes)


def _lighter(attempt: SupervisedAttempt, start: Start) -> Start | None:
    """The order for a next trainer that needs less, after out-of-memory; None if no other may help.

    A job that shared its trainer is queued again with what was learned: its own share has no room for another base.
    """
    lighter = _next_adjustment(attempt, start)
    if lighter is None:
        return None
    then = "continues alone" if attempt.run.goes_on_alone else "restarts"
    where, cards = f"at step {attempt.heard.step}", max(1, len(start.ranks))
    text = in_words(start.spec, attempt.heard.adjustment, lighter, where=where, then=then, cards=cards)
    log.info("job %s: %s", attempt.claim.job_id, text)
    events = (*attempt.unwritten.pending.events, ("memory", text))
    attempt.unwritten.pending = replace(attempt.unwritten.pending, adjustment=lighter, events=events)
    changes = [*start.changes, *attempt.heard.changes, text]
    attempt.heard.adjustment, attempt.heard.ended, attempt.heard.changes = lighter, None, []
    if attempt.run.goes_on_alone:
        attempt.heard.ended = Ended(job_id=start.job_id, reason=Reason.HOST_LOST, message=text)
        return None
    return start.model_copy(update={"adjustment": lighter, "changes": changes})


def _next_adjustment(attempt: SupervisedAttempt, start: Start) -> Adjustment | None:
    """Whether a finer split of the batch may help. It does not for out-of-memory before or after the training itself:
    before it, the trainer has tried all splits. Ranks that divide a base are out of step after the first try."""
    if attempt.own.forced is not None or attempt.own.lease_lost or attempt.heard.ended is None:
        return None
    tries = (Stage.PREPARING, Stage.TRAINING) if start.parallel is Parallel.SHARDED else (Stage.TRAINING,)
    if attempt.heard.ended.reason is not Reason.OUT_OF_MEMORY or attempt.unwritten.pending.stage not in tries:
        return None
    cards = max(1, len(start.ranks))
    return next_adjustment(start.spec, attempt.heard.adjustment, on_gpu=start.device == "cuda", cards=cards)


def _close(place: Workplace, attempt: SupervisedAttempt, upload: CheckpointUpload, patience_s: float) -> None:
    """Wait at most this long for the last checkpoint to be stored, and keep the lease."""
    upload.close()
    deadline = place.clock.now() + patience_s
    while not upload.done(min(place.beat_s, max(0.0, deadline - place.clock.now()))):
        if attempt.own.lease_lost or attempt.wishes.cancel_requested or upload.silent or place.clock.now() >= deadline:
            return
        beat(place, attempt)


def _take_all(told: queue.SimpleQueue[Told | str], attempt: SupervisedAttempt, timeout: float = 0.0) -> None:
    """Fold the trainer's messages since the last look into the attempt."""
    while True:
        try:
            message = attempt.clock.get(told, timeout) if timeout else told.get_nowait()
        except queue.Empty:
            return
        timeout = 0.0
        attempt.hear(message)


def _hand_on(place: Workplace, attempt: SupervisedAttempt, link: TrainerLink, upload: CheckpointUpload) -> None:
    """Pass new checkpoints on to the artifact store, and measured passes to the pack rule."""
    if attempt.heard.passes and place.hosts is not None and link.trainer.mark:
        place.hosts.note_passes(link.trainer.mark, attempt.heard.passes)
    attempt.heard.passes = []
    for saved in attempt.heard.saved:
        upload.offer(Path(saved.path), saved.step)
    attempt.heard.saved = []
