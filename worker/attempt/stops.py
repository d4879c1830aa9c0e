"""Why an attempt stops before its end: cancelled, pruned, preempted, out of time, silent, drained."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from loractl.common.job.status import Reason, Stage
from loractl.worker.protocol.messages import Stop

from .attempt import AttemptState
from .trainer_process import LEAVE_S
from .workplace import Workplace

log = logging.getLogger("loractl.worker")

STOP_GRACE_S = 10.0
"""Seconds that a trainer has to stop after a cancel, or as one of its sweep's losers, before it is killed."""

DRAIN_GRACE_S = 120.0
"""Seconds that a drain, a job of higher priority or a time limit waits for the current step and its checkpoint."""

SILENCE_S = 1800.0
"""A trainer hangs if it says nothing for so long while it trains or evaluates. It tells a step a second at most."""


SILENT = f"the trainer said nothing for {SILENCE_S / 60:.0f} min"


class Interrupted(Exception):
    """Fetching or storing was given up: the lease is lost, or the job is cancelled or drained."""


@dataclass(frozen=True, kw_only=True)
class StopWish:
    """Why a trainer must stop, and how."""

    reason: Reason
    message: str
    save: bool = False  # with a checkpoint
    grace_s: float = STOP_GRACE_S


def wanted_stop(place: Workplace, state: AttemptState) -> StopWish | None:
    """The most urgent wish to end this attempt; None without one."""
    if state.lease_lost:  # it shares its trainer, else that was killed
        return StopWish(reason=Reason.WORKER_LOST, message="its lease was lost")
    if state.cancel_requested:
        return StopWish(reason=Reason.CANCELLED, message="cancelled while it ran")
    if state.pruned is not None:
        return StopWish(reason=Reason.PRUNED, message=state.pruned)
    if state.preempted_by is not None:
        why = f"gave way to job {state.preempted_by}, which has a higher priority"
        return StopWish(reason=Reason.PREEMPTED, message=why, save=True, grace_s=DRAIN_GRACE_S)
    limit = state.time_limit
    if limit is not None and state.began is not None and state.clock.now() - state.began > limit:
        why = f"ran longer than resources.time_limit ({limit:.0f} s)"
        return StopWish(reason=Reason.TIMED_OUT, message=why, save=True, grace_s=DRAIN_GRACE_S)
    if place.drain.wish is not None:
        why = _why_drained(place, state, "the worker is being stopped")
        return StopWish(reason=Reason.DRAINED, message=why, save=True, grace_s=DRAIN_GRACE_S)
    if state.card_drained is not None:
        return StopWish(reason=Reason.DRAINED, message=state.card_drained, save=True, grace_s=DRAIN_GRACE_S)
    if is_silent(state):  # it shares its trainer, else that was killed
        return StopWish(reason=Reason.TRAINER_ERROR, message=SILENT)
    return None


def _why_drained(place: Workplace, state: AttemptState, stopped: str) -> str:
    """`stopped`, where the worker itself ends; else whose order keeps the card empty."""
    return stopped if place.drain.asked is not None else state.card_drained or f"{place.node} is drained"


def is_silent(state: AttemptState) -> bool:
    """Whether the trainer has said nothing of the job for so long that the job hangs."""
    busy = state.pending.stage in (Stage.TRAINING, Stage.EVALUATING)
    return busy and state.clock.now() - max(state.heard_at, state.log.heard) > SILENCE_S


def closes_now(state: AttemptState) -> bool:
    """Whether the job's row is closed though the job is not out of the trainer that it shares: where its stop leaves no
    checkpoint, or was not obeyed in time. What it holds of the card stays held."""
    link = state.trainer
    if state.forced is None or link is None or not link.leaves_others or state.lease_lost or state.gone_as is not None:
        return False
    if state.ended is not None and state.ended.reason is Reason.OK:
        return False
    late = state.kill_at is not None and state.clock.now() > state.kill_at
    return late or state.forced[0] in (Reason.CANCELLED, Reason.PRUNED)


def does_not_leave(state: AttemptState) -> bool:
    """Whether a job that was told to stop is still in a trainer that goes on with others, long after that."""
    link = state.trainer
    late = state.kill_at is not None and state.clock.now() > state.kill_at + LEAVE_S
    return late and link is not None and link.leaves_others


def ask_to_stop(state: AttemptState, wish: StopWish) -> None:
    """Tell the trainer to end, once; it is killed after the grace period. A cancel comes before any other wish."""
    if state.forced is not None and (state.forced[0] is wish.reason or wish.reason is not Reason.CANCELLED):
        return
    state.forced = wish.reason, wish.message
    state.kill_at = state.clock.now() + wish.grace_s
    assert state.trainer is not None
    state.trainer.send(Stop(job_id=state.claim.job_id, save=wish.save))


def must_leave(place: Workplace, state: AttemptState) -> bool:
    """Whether the trainer must be killed now, whatever it is doing.

    One that has other jobs goes on with them; a job that was told to stop leaves it between two steps, unless none of
    them takes any.
    """
    now, link = state.clock.now(), state.trainer
    shares = link is not None and not link.alone
    if state.lease_lost and not shares:
        return True
    if is_silent(state) and not shares:
        state.forced = Reason.TRAINER_ERROR, SILENT
        return True
    if is_silent(state) and state.gone_as is None and link is not None and link.stuck:
        state.forced = Reason.HOST_LOST, f"it shared its trainer with others, of which none took a step: {SILENT}"
        return True
    if place.drain.wish == "now":
        state.forced = Reason.DRAINED, "the worker was stopped at once"
        return True
    if state.kill_at is not None and now > state.kill_at and (link is None or not shares or link.stuck):
        log.warning("job %s: the trainer did not stop in time and is killed", state.claim.job_id)
        return True
    return False


def require_wanted(place: Workplace, state: AttemptState) -> None:
    """Give up our own slow work when its result is no longer wanted. Raises Interrupted.

    A training that is done is stored even while its box is drained: that is what the wait was for.
    """
    if state.lease_lost:
        raise Interrupted
    drained = place.drain.wish is not None
    if state.ended is not None:
        if not (state.store_away and (state.cancel_requested or drained)):
            return
        state.ended = None
        if state.cancel_requested:
            state.forced = Reason.CANCELLED, "cancelled while it waited for the artifact store"
        else:
            why = _why_drained(place, state, "the worker was stopped")
            state.forced = Reason.DRAINED, f"{why}, while the artifact store was away"
    elif state.cancel_requested:
        state.forced = Reason.CANCELLED, "cancelled before it trained"
    elif drained:
        why = _why_drained(place, state, "the worker was stopped")
        state.forced = Reason.DRAINED, f"{why}, before it trained"
    if state.forced is not None:
        raise Interrupted
