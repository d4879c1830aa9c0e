"""One attempt from claim to finish: data fetched, trainer watched, artifacts stored, the row closed.

The supervisor is a thread of its node's process and holds the claim. It beats every few seconds, passes on what the
trainer tells, and stops the trainer when the job is cancelled, over its time, drained, or no longer ours. A result is
listed only when the last guarded write succeeded.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from loractl.common.errors import ArtifactError, LoractlError, NotStorable, ResultTaken, ServiceUnreachable
from loractl.common.job.status import KEEPING, Reason, Stage, Status
from loractl.common.store.database import REFUSALS, outage, told_by
from loractl.common.store.records import Progress, StoredResult
from loractl.common.units import amount
from loractl.worker.protocol.messages import Ended
from loractl.worker.protocol.trust import Refused

from .attempt import AttemptState
from .cleanup import clean
from .heartbeat import while_beating
from .order import prepare
from .patience import Patience, away
from .result import READY, mark_ready, store_result, take_ready
from .stops import Interrupted
from .storage.client import CallWatch
from .trainer_run import train
from .workplace import Workplace

log = logging.getLogger("loractl.worker")
Answer = TypeVar("Answer")


def supervise(place: Workplace, state: AttemptState) -> Status | None:
    """Run one attempt to its end; returns the job's status, None when the lease was lost on the way."""
    claim = state.claim
    place = replace(place, artifacts=place.artifacts.watched(_watch(place, state)))
    log.info("job %s %s: attempt %s with %s", claim.job_id, claim.spec.name, claim.attempt, claim.method.value)
    reason, message, result = _carry_out(place, state)
    if state.lease_lost:
        state.closed = True
        log.warning("job %s: the lease of attempt %s was lost, its result is dropped", claim.job_id, claim.attempt)
        _leave_host(place, state)
        clean(place, state, None)  # the next attempt may go on from its checkpoints
        return None
    if state.gone_as is not None:
        state.closed = True
        _leave_host(place, state)
        clean(place, state, state.gone_as)
        return state.gone_as
    if reason in KEEPING and not state.cancel_requested and (state.folder / READY).exists():
        state.note("kept", f"{place.settings.host} keeps the finished result: an attempt there stores it")
    status = _finish(place, state, reason, message, result)
    state.closed = True
    if status is None:  # it was lost while its end waited
        _leave_host(place, state)
    named = status.value if status else "lost"
    because = "" if reason.value in (named, Reason.OK.value) else f" ({reason.value})"
    log.info("job %s %s: %s%s: %s", claim.job_id, claim.spec.name, named, because, message)
    if not state.result_refused:
        clean(place, state, status)
    return status


def _leave_host(place: Workplace, state: AttemptState) -> None:
    """Give back what an attempt whose row was closed before still held of a trainer: it is out of that now."""
    if state.host is None and not state.stayed:
        return
    try:
        _insist(place, state, lambda: place.store.leave_host(state.claim))
    except REFUSALS as error:
        log.warning("job %s: what it held of its trainer stays held: %s", state.claim.job_id, told_by(error))


def _finish(
    place: Workplace, state: AttemptState, reason: Reason, message: str, result: StoredResult | None
) -> Status | None:
    """The last write. What the database refuses is left out: what was told at last, then the result.

    A result that the row can't name is kept on this box, and the attempt ends as trainer_error.
    """

    def write(reason: Reason, message: str, last: Progress, result: StoredResult | None) -> Status | None:
        return _insist(place, state, lambda: place.store.finish(state.claim, reason, message, last, result, card=card))

    card = state.failed_card
    last = state.progress(last=True)
    try:
        return write(reason, message, last, result)
    except REFUSALS as error:
        why = _refused(state, error)
    bare = state.bare_progress(why)
    try:
        return write(reason, message, bare, result)
    except REFUSALS as error:
        why = _refused(state, error)
    state.result_refused = result is not None
    kept = "; its result is kept on this box, where the next attempt takes it over" if result is not None else ""
    message = f"the database refused its end: {why}{kept}"
    try:
        return write(Reason.TRAINER_ERROR, message, last, None)
    except REFUSALS as error:
        _refused(state, error)
    return write(Reason.TRAINER_ERROR, message, bare, None)


def _refused(state: AttemptState, error: BaseException) -> str:
    """What the database has against the last write. Raises the error when it is away: then nothing was refused."""
    if outage(error) is not None:
        raise error
    log.error("job %s: the database refused its last write: %s", state.claim.job_id, told_by(error))
    return told_by(error)


def _carry_out(place: Workplace, state: AttemptState) -> tuple[Reason, str, StoredResult | None]:
    """All work before the last write. Any failure becomes a reason and a sentence."""
    claim = state.claim
    try:
        shutil.rmtree(state.folder, ignore_errors=True)
        (state.folder / "result").mkdir(parents=True)
        taken = while_beating(place, state, lambda: take_ready(state))
        if taken is not None:
            state.ended = Ended(job_id=claim.job_id, reason=Reason.OK, message=taken)
        else:
            if claim.result_host == place.settings.host:
                state.pending = replace(state.pending, result_host="")  # it is torn, or somebody removed it
            train(place, state, _with_patience(place, state, prepare, away))
        reason, message = state.verdict()
        if reason is not Reason.OK or state.gone_as is not None:
            return reason, message, None
        state.pending = replace(state.pending, stage=Stage.STORING)
        if taken is None:
            while_beating(place, state, lambda: mark_ready(state.folder, state.claim, message))
        _say_what_is_stored(state)
        state.pending = replace(state.pending, result_host=place.settings.host)
        return reason, message, _with_patience(place, state, store_result, _not_stored)
    except Interrupted:
        return *state.verdict(), None
    except (LoractlError, OSError) as error:
        return *_explain(error), None
    except Exception as error:
        # our own fault, but the job must still say at once why it ended
        log.exception("job %s: the supervisor failed", state.claim.job_id)
        return Reason.TRAINER_ERROR, f"the supervisor failed: {error!r}", None


def _say_what_is_stored(state: AttemptState) -> None:
    """A large result on a slow line takes long: history and log say what goes on."""
    files = [path for path in (state.folder / "result").rglob("*") if path.is_file()]
    size = amount(sum(path.stat().st_size for path in files))
    state.phase(Stage.STORING, f"stores {len(files)} files, {size}, and reads them back")


def _watch(place: Workplace, state: AttemptState) -> CallWatch:
    """How this attempt waits for the artifact store: its history says for what, and its end leaves the call."""
    return CallWatch(
        slow_s=place.slow_s,
        silent=lambda doing: state.note("store", f"waits for the artifact store: {doing}"),
        over=lambda: state.lease_lost or state.closed,
    )


def _with_patience(
    place: Workplace,
    state: AttemptState,
    work: Callable[[Workplace, AttemptState], Answer],
    passing: Callable[[BaseException], str | None],
) -> Answer:
    """Fetch or store, and try again while the artifact store is away or hangs: that is not the job's fault.

    The job shows the stage that it is in, and the reason stands in its history.
    """
    patience = Patience(
        first_s=2.0,
        most_s=30.0,
        total_s=place.settings.store_patience_s,
        passing=passing,
        over=lambda: state.lease_lost or state.closed,
        clock=place.clock,
    )

    def tell(why: str) -> None:
        if not state.store_away:
            log.warning("job %s: %s", state.claim.job_id, why)
            state.note("store", why)
        state.store_away = True

    def answers() -> None:
        state.store_away = False

    watch = replace(
        _watch(place, state), silent=lambda doing: tell(f"waits for the artifact store: {doing}"), going_on=answers
    )
    waiting = replace(place, artifacts=place.artifacts.watched(watch))
    answer = while_beating(
        place,
        state,
        lambda: patience.repeat(lambda: work(waiting, state), lambda why: tell(f"{why}; it is tried again")),
    )
    state.store_away = False
    return answer


def _not_stored(error: BaseException) -> str | None:
    """While storing, a file that reads back differently is tried again too; a place that is taken stays so, and what
    no store takes."""
    if isinstance(error, (ResultTaken, NotStorable)):
        return None
    return error.sentence if isinstance(error, ArtifactError) else away(error)


def _insist(place: Workplace, state: AttemptState, write: Callable[[], Answer]) -> Answer:
    """Repeat a last write until the database is back: an outage must not cost a finished training."""

    def tell(why: str) -> None:
        state.turn()
        log.warning("job %s: %s: its end waits for that", state.claim.job_id, why)

    state.turn()
    wait = Patience(first_s=0.5, most_s=10.0, over=lambda: place.drain.wish == "now", clock=place.clock)
    return wait.repeat(write, tell)


def _explain(error: Exception) -> tuple[Reason, str]:
    """The reason for a failure on our own side, outside the trainer."""
    if isinstance(error, OSError):
        reason = Reason.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.TRAINER_ERROR
        return reason, f"{error.strerror or error}: {error.filename or ''}".strip(": ")
    if isinstance(error, NotStorable):  # the next attempt would leave the same
        return Reason.BAD_SPEC, error.sentence
    if isinstance(error, (ArtifactError, ServiceUnreachable)):
        return Reason.STORE_FAILED, error.sentence
    if isinstance(error, Refused):
        return Reason.BAD_SPEC, error.sentence
    return Reason.TRAINER_ERROR, str(error)
