"""One attempt from claim to finish: data fetched, trainer watched, artifacts stored, the row closed.

The supervisor is a thread of its node's process and holds the claim. It beats every few seconds, passes on what the
trainer reports, and stops the trainer when the job is cancelled, over its time, drained, or no longer ours. A result is
listed only when the last guarded write succeeded.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from loractl.common.errors import (
    ArtifactError,
    LoractlError,
    NotStorable,
    ResultTaken,
    SchemaMismatch,
    ServiceUnreachable,
    WrongStore,
)
from loractl.common.job.status import KEEPING, Reason, Stage, Status
from loractl.common.store.database import REFUSALS, told_by
from loractl.common.store.records import Progress, StoredResult
from loractl.common.units import amount
from loractl.worker.protocol.messages import Ended
from loractl.worker.protocol.trust import Refused

from .attempt import SupervisedAttempt
from .order import prepare
from .result import READY, clean, mark_ready, store_result, take_ready
from .stops import Interrupted, while_beating
from .storage.client import CallWatch
from .trainer_run import train
from .workplace import Patience, Workplace, away

log = logging.getLogger("loractl.worker")
Answer = TypeVar("Answer")


def supervise(place: Workplace, attempt: SupervisedAttempt) -> Status | None:
    """Run one attempt to its end; returns the job's status, None if the lease was lost."""
    claim = attempt.claim
    place = replace(place, artifacts=place.artifacts.watched(_watch(place, attempt)))
    log.info("job %s %s: attempt %s with %s", claim.job_id, claim.spec.name, claim.attempt, claim.method.value)
    reason, message, result = _carry_out(place, attempt)
    if attempt.own.lease_lost:
        attempt.own.closed = True
        log.warning("job %s: the lease of attempt %s was lost, its result is dropped", claim.job_id, claim.attempt)
        clean(place, attempt, None)  # the next attempt may continue from its checkpoints
        return None
    if reason in KEEPING and not attempt.wishes.cancel_requested and (attempt.folder / READY).exists():
        attempt.unwritten.note("kept", f"{place.settings.host} keeps the finished result: an attempt there stores it")
    status = _finish(place, attempt, reason, message, result)
    attempt.own.closed = True
    named = status.value if status else "lost"
    because = "" if reason.value in (named, Reason.OK.value) else f" ({reason.value})"
    log.info("job %s %s: %s%s: %s", claim.job_id, claim.spec.name, named, because, message)
    if not attempt.own.result_refused:
        clean(place, attempt, status)
    return status


def _finish(
    place: Workplace, attempt: SupervisedAttempt, reason: Reason, message: str, result: StoredResult | None
) -> Status | None:
    """The last write. What the database refuses is left out: first the last messages, then the result.

    A result that the row can't name is kept on this box, and the attempt ends as trainer_error.
    """

    def write(reason: Reason, message: str, last: Progress, result: StoredResult | None) -> Status | None:
        return _insist(
            place, attempt, lambda: place.store.attempts.finish(attempt.claim, reason, message, last, result, card=card)
        )

    card = attempt.failed_card
    last = attempt.progress(last=True)
    try:
        return write(reason, message, last, result)
    except REFUSALS as error:
        why = _refused(attempt, error)
    bare = attempt.unwritten.bare_progress(attempt.heard.step, why)
    try:
        return write(reason, message, bare, result)
    except REFUSALS as error:
        why = _refused(attempt, error)
    attempt.own.result_refused = result is not None
    kept = "; its result is kept on this box, where the next attempt takes it over" if result is not None else ""
    message = f"the database refused its end: {why}{kept}"
    try:
        return write(Reason.TRAINER_ERROR, message, last, None)
    except REFUSALS as error:
        _refused(attempt, error)
    return write(Reason.TRAINER_ERROR, message, bare, None)


def _refused(attempt: SupervisedAttempt, error: BaseException) -> str:
    """Why the database refuses the last write. Raises the error if it is down, or if the tables are another version's:
    then it is nothing in this write."""
    if (why := error.sentence if isinstance(error, SchemaMismatch) else away(error)) is not None:
        of = " of that revision" if isinstance(error, SchemaMismatch) else ""
        what = f"once its lease ends, a worker{of} goes on from the last stored checkpoint"
        log.warning("job %s: %s; %s", attempt.claim.job_id, why, what)
        raise error
    log.error("job %s: the database refused its last write: %s", attempt.claim.job_id, told_by(error))
    return told_by(error)


def _carry_out(place: Workplace, attempt: SupervisedAttempt) -> tuple[Reason, str, StoredResult | None]:
    """All work before the last write. Any failure becomes a reason and a sentence."""
    claim = attempt.claim
    try:
        shutil.rmtree(attempt.folder, ignore_errors=True)
        (attempt.folder / "result").mkdir(parents=True)
        taken = while_beating(place, attempt, lambda: take_ready(attempt))
        if taken is not None:
            attempt.heard.ended = Ended(job_id=claim.job_id, reason=Reason.OK, message=taken)
        else:
            if claim.result_host == place.settings.host:
                attempt.unwritten.pending = replace(
                    attempt.unwritten.pending, result_host=""
                )  # it is incomplete, or somebody removed it
            train(place, attempt, _with_patience(place, attempt, prepare, _store_away))
            while attempt.lays_aside():
                train(place, attempt, _with_patience(place, attempt, prepare, _store_away))
        reason, message = attempt.verdict()
        if reason is not Reason.OK:
            return reason, message, None
        attempt.unwritten.pending = replace(attempt.unwritten.pending, stage=Stage.STORING)
        if taken is None:
            while_beating(place, attempt, lambda: mark_ready(attempt.folder, attempt.claim, message))
        # a large result on a slow connection takes long: history and log say what is happening
        files = [path for path in (attempt.folder / "result").rglob("*") if path.is_file()]
        size = amount(sum(path.stat().st_size for path in files))
        attempt.phase(Stage.STORING, f"stores {len(files)} files, {size}, and reads them back")
        attempt.unwritten.pending = replace(attempt.unwritten.pending, result_host=place.settings.host)
        return reason, message, _with_patience(place, attempt, store_result, _not_stored)
    except Interrupted:
        return *attempt.verdict(), None
    except (LoractlError, OSError) as error:
        return *_explain(error), None
    except Exception as error:
        # our own bug, but the job must still say at once why it ended
        log.exception("job %s: the supervisor failed", attempt.claim.job_id)
        return Reason.TRAINER_ERROR, f"the supervisor failed: {error!r}", None


def _watch(place: Workplace, attempt: SupervisedAttempt) -> CallWatch:
    """How this attempt waits for the artifact store: its history says for what, and its end abandons the call."""
    return CallWatch(
        slow_s=place.slow_s,
        silent=lambda doing: attempt.unwritten.note("store", f"waits for the artifact store: {doing}"),
        over=lambda: attempt.own.lease_lost or attempt.own.closed,
    )


def _with_patience(
    place: Workplace,
    attempt: SupervisedAttempt,
    work: Callable[[Workplace, SupervisedAttempt], Answer],
    passing: Callable[[BaseException], str | None],
) -> Answer:
    """Fetch or store, and try again while the artifact store is down or hangs: that is not the job's fault.

    The job shows its stage, and its history the reason.
    """
    patience = Patience(
        first_s=2.0,
        most_s=30.0,
        total_s=place.settings.store_patience_s,
        passing=passing,
        over=lambda: attempt.own.lease_lost or attempt.own.closed,
        clock=place.clock,
    )

    def tell(why: str) -> None:
        if not attempt.own.store_away:
            log.warning("job %s: %s", attempt.claim.job_id, why)
            attempt.unwritten.note("store", why)
        attempt.own.store_away = True

    def answers() -> None:
        attempt.own.store_away = False

    watch = replace(
        _watch(place, attempt), silent=lambda doing: tell(f"waits for the artifact store: {doing}"), going_on=answers
    )
    waiting = replace(place, artifacts=place.artifacts.watched(watch))
    answer = while_beating(
        place,
        attempt,
        lambda: patience.repeat(lambda: work(waiting, attempt), lambda why: tell(f"{why}; it is tried again")),
    )
    attempt.own.store_away = False
    return answer


def _store_away(error: BaseException) -> str | None:
    """While nothing is trained, another box can begin at once: it may have the lab's store."""
    return None if isinstance(error, WrongStore) else away(error)


def _not_stored(error: BaseException) -> str | None:
    """While storing, a file that reads back differently is tried again too, but not a place that is taken, nor what no
    store takes."""
    if isinstance(error, (ResultTaken, NotStorable)):
        return None
    return error.sentence if isinstance(error, ArtifactError) else away(error)


def _insist(place: Workplace, attempt: SupervisedAttempt, write: Callable[[], Answer]) -> Answer:
    """Repeat a last write until the database is back: an outage must not cost a finished training.

    A worker that stops repeats it for a lease: after that another one may have the job. Its files stay on this box.
    """
    ends = math.inf

    def over() -> bool:
        nonlocal ends
        if place.drain.asked is not None:
            ends = min(ends, place.clock.now() + place.settings.lease_s)
        return place.drain.wish == "now" or place.clock.now() >= ends

    def tell(why: str) -> None:
        attempt.turn()
        log.warning("job %s: %s: its end waits for that", attempt.claim.job_id, why)

    attempt.turn()
    wait = Patience(first_s=0.5, most_s=10.0, over=over, clock=place.clock)
    return wait.repeat(write, tell)


def _explain(error: Exception) -> tuple[Reason, str]:
    """The reason for a failure on our own side, outside the trainer."""
    if isinstance(error, OSError):
        reason = Reason.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.TRAINER_ERROR
        return reason, f"{error.strerror or error}: {error.filename or ''}".strip(": ")
    if isinstance(error, NotStorable):  # the next attempt would leave the same
        return Reason.BAD_SPEC, error.sentence
    if isinstance(error, (WrongStore, SchemaMismatch)):  # nobody's failure that the job or its retries would answer for
        return Reason.DRAINED, error.sentence
    if isinstance(error, (ArtifactError, ServiceUnreachable)):
        return Reason.STORE_FAILED, error.sentence
    if isinstance(error, Refused):
        return Reason.BAD_SPEC, error.sentence
    return Reason.TRAINER_ERROR, str(error)
