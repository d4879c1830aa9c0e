"""The heartbeat of an attempt: it keeps the lease, writes what is new, and brings back people's requests."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import Any, TypeVar

from loractl.common.store.database import REFUSALS, outage, told_by
from loractl.common.store.records import Beat

from .attempt import SupervisedAttempt
from .stops import require_wanted
from .workplace import Workplace

log = logging.getLogger("loractl.worker")
Answer = TypeVar("Answer")


def beat(place: Workplace, attempt: SupervisedAttempt) -> None:
    """One heartbeat. No database error ends a training: the lease decides."""
    attempt.turn()
    if attempt.own.gone_as is not None:
        return  # its row is closed
    answer: Beat | None
    try:
        answer = place.store.attempts.beat(attempt.claim, attempt.unwritten.progress(attempt.heard.peaks))
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
