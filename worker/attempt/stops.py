"""The heartbeat of an attempt, and why an attempt stops before its end. The heartbeat keeps the lease, writes what is
new, and brings back what people ask; an attempt stops once it is cancelled, pruned, preempted, out of time, silent or
drained.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from loractl.common.errors import SchemaMismatch
from loractl.common.job.status import Reason, Stage
from loractl.common.store.database import REFUSALS, outage, told_by
from loractl.common.store.records import Beat
from loractl.worker.protocol.messages import Stop

from .attempt import SupervisedAttempt
from .workplace import STOP_SHARE, Workplace

log = logging.getLogger("loractl.worker")

STOP_GRACE_S = 10.0
"""Seconds that a trainer has to stop after a cancel, or as a loser of its sweep, before it is killed."""

DRAIN_GRACE_S = 120.0
"""Seconds that a drain or a time limit waits for the current step and its checkpoint."""

SILENCE_S = 1800.0
"""A trainer hangs if it is silent for this long while it trains or evaluates. It reports at most one step a second.
So a job that gives way to another ends its step first."""


class Interrupted(Exception):
    """Fetching or storing was abandoned: the lease is lost, or the job is cancelled or drained."""


@dataclass(frozen=True, kw_only=True)
class StopWish:
    """Why a trainer must stop, and how."""

    reason: Reason
    message: str
    save: bool = False  # with a checkpoint
    grace_s: float = STOP_GRACE_S


def wanted_stop(place: Workplace, attempt: SupervisedAttempt) -> StopWish | None:
    """The most urgent reason to end this attempt, or None."""
    if attempt.wishes.cancel_requested:
        return StopWish(reason=Reason.CANCELLED, message="cancelled while it ran")
    if attempt.wishes.pruned is not None:
        return StopWish(reason=Reason.PRUNED, message=attempt.wishes.pruned)
    limit = attempt.wishes.time_limit
    if limit is not None and attempt.own.began is not None and attempt.clock.now() - attempt.own.began > limit:
        why = f"ran longer than resources.time_limit ({limit:.0f} s)"
        return StopWish(reason=Reason.TIMED_OUT, message=why, save=True, grace_s=DRAIN_GRACE_S)
    if place.drain.wish is not None:
        why = _why_drained(place, attempt, "the worker is being stopped")
        grace_s = DRAIN_GRACE_S if place.drain.grace_s is None else STOP_SHARE * place.drain.grace_s
        return StopWish(reason=Reason.DRAINED, message=why, save=True, grace_s=grace_s)
    if attempt.wishes.card_drained is not None:
        return StopWish(reason=Reason.DRAINED, message=attempt.wishes.card_drained, save=True, grace_s=DRAIN_GRACE_S)
    if attempt.wishes.preempted_by is not None:  # last: it waits for the step, and the others for no longer than theirs
        why = f"gave way to job {attempt.wishes.preempted_by}"
        return StopWish(reason=Reason.PREEMPTED, message=why, save=True, grace_s=SILENCE_S)
    return None


def _why_drained(place: Workplace, attempt: SupervisedAttempt, stopped: str) -> str:
    """`stopped`, if the worker itself ends; else whose order keeps the card empty."""
    return stopped if place.drain.asked is not None else attempt.wishes.card_drained or f"{place.node} is drained"


def is_silent(attempt: SupervisedAttempt) -> bool:
    """Whether the trainer has been silent about the job for so long that the job hangs."""
    busy = attempt.unwritten.pending.stage in (Stage.TRAINING, Stage.EVALUATING)
    return busy and attempt.clock.now() - max(attempt.heard.at, attempt.unwritten.log.heard) > SILENCE_S


def ask_to_stop(attempt: SupervisedAttempt, wish: StopWish) -> None:
    """Tell the trainer to end, once; it is killed after the shortest grace period. A cancel overrides any other
    request."""
    kill_at = attempt.clock.now() + wish.grace_s
    attempt.own.kill_at = kill_at if attempt.own.kill_at is None else min(kill_at, attempt.own.kill_at)
    if attempt.own.forced is not None and (attempt.own.forced[0] is wish.reason or wish.reason is not Reason.CANCELLED):
        return
    attempt.own.forced = wish.reason, wish.message
    assert attempt.own.trainer is not None
    attempt.own.trainer.send(Stop(job_id=attempt.claim.job_id, save=wish.save))


def must_be_killed(place: Workplace, attempt: SupervisedAttempt) -> bool:
    """Whether the trainer must be killed now, whatever it is doing."""
    if attempt.own.lease_lost:
        return True
    if is_silent(attempt):
        attempt.own.forced = Reason.TRAINER_ERROR, f"the trainer was silent for {SILENCE_S / 60:.0f} min"
        return True
    if place.drain.wish == "now":
        attempt.own.forced = Reason.DRAINED, "the worker was stopped at once"
        return True
    if attempt.own.kill_at is not None and attempt.clock.now() > attempt.own.kill_at:
        log.warning("job %s: the trainer did not stop in time and is killed", attempt.claim.job_id)
        return True
    return False


def require_wanted(place: Workplace, attempt: SupervisedAttempt) -> None:
    """Abandon our own slow work if its result is no longer wanted. Raises Interrupted.

    A finished training is stored even while its box is drained: that is what the wait was for.
    """
    if attempt.own.lease_lost:
        raise Interrupted
    drained = place.drain.wish is not None
    if attempt.heard.ended is not None:
        at_once = place.drain.wish == "now"
        if not (at_once or (attempt.own.store_away and (attempt.wishes.cancel_requested or drained))):
            return
        attempt.heard.ended = None
        if attempt.wishes.cancel_requested:
            attempt.own.forced = Reason.CANCELLED, "cancelled while it waited for the artifact store"
        elif at_once:
            attempt.own.forced = Reason.DRAINED, "the worker was stopped at once, before the result was stored"
        else:
            why = _why_drained(place, attempt, "the worker was stopped")
            attempt.own.forced = Reason.DRAINED, f"{why}, while the artifact store was away"
    elif attempt.wishes.cancel_requested:
        attempt.own.forced = Reason.CANCELLED, "cancelled before it trained"
    elif drained:
        why = _why_drained(place, attempt, "the worker was stopped")
        attempt.own.forced = Reason.DRAINED, f"{why}, before it trained"
    if attempt.own.forced is not None:
        raise Interrupted


Answer = TypeVar("Answer")


def beat(place: Workplace, attempt: SupervisedAttempt) -> None:
    """One heartbeat. No database error ends a training: the lease decides."""
    attempt.turn()
    answer: Beat | None
    try:
        answer = place.store.attempts.beat(attempt.claim, attempt.progress())
    except REFUSALS as error:
        answer = _beat_alone(place, attempt, error)
    finally:
        attempt.turn()
    if answer is None:
        return
    attempt.beaten(answer)
    if not answer.recorded:
        log.warning("job %s: somebody has locked its row; training continues, and reports later", attempt.claim.job_id)


def _beat_alone(place: Workplace, attempt: SupervisedAttempt, error: BaseException) -> Beat | None:
    """After an outage, None: a later beat reports what is new. Else the beat without what the database refused.

    None: the lease was not extended.
    """
    if isinstance(error, SchemaMismatch):
        return None  # the monitor says so, and lets the job give its card back
    if (why := outage(error)) is None:
        log.warning("job %s: the database refused a heartbeat: %s", attempt.claim.job_id, told_by(error))
        attempt.turn()
        try:
            return place.store.attempts.beat(
                attempt.claim, attempt.unwritten.bare_progress(attempt.heard.step, told_by(error))
            )
        except REFUSALS as again:
            why = outage(again) or told_by(again)
    log.warning("job %s: the database takes no heartbeat, training continues: %s", attempt.claim.job_id, why)
    return None


def while_beating(place: Workplace, attempt: SupervisedAttempt, work: Callable[[], Answer]) -> Answer:
    """Do our own slow work (fetching, uploading) in a thread, while the heartbeat continues.

    Raises what the work raises, and Interrupted if its result is no longer wanted.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def do() -> None:
        try:
            outcome.put(work())
        except Exception as error:  # noqa: BLE001  handed to the thread that waits for it, which raises it
            outcome.put(error)

    place.clock.start(do, f"work of job {attempt.claim.job_id}")
    while True:
        beat(place, attempt)
        require_wanted(place, attempt)
        try:
            done = place.clock.get(outcome, place.beat_s)
        except queue.Empty:
            continue
        if isinstance(done, Exception):
            raise done
        return done
