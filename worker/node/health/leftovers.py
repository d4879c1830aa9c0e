"""What keeps a device busy that should not: processes that attempts leave behind are killed, or the card is closed;
supervisors that hang lose their trainer, or their node ends."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping

from loractl.common.job.status import Reason
from loractl.common.store.records import Claim
from loractl.worker.attempt.attempt import SupervisedAttempt
from loractl.worker.attempt.stops import DRAIN_GRACE_S
from loractl.worker.attempt.trainer_run import LEFT_S, left_of
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import CARD_VARIABLE, RANK_VARIABLE, card_mark, end_leftovers, run_mark, runs_of

log = logging.getLogger("loractl.worker")


def close_if_left(place: Workplace, claim: Claim, supervised: Callable[[], Collection[int]]) -> None:
    """Check after an attempt that none of its processes and memory remains; else close the card, with the reason.

    `supervised`: the jobs of the node's attempts that have not ended yet. If the lease was lost, the job may be among
    them again: memory is known by its job, so what this attempt left can't be told from what the next one holds. The
    check after that one sees both.
    """
    deadline = place.clock.now() + LEFT_S
    while (left := left_of(place, claim)) is not None:
        if claim.job_id in supervised():
            return
        if place.clock.now() > deadline:
            reason = f"job {claim.job_id} left {left} behind; check the card, then loractl undrain {place.node}"
            log.error("%s is closed: %s", place.node, reason)
            place.store.cards.drain(place.node, "loractl", reason)
            return
        place.clock.sleep(0.5)


def end_all(place: Workplace) -> None:
    """End what a killed earlier node of this device left running; this node runs nothing yet."""
    for run in runs_of(card_mark(place.settings, place.node), CARD_VARIABLE):
        end_leftovers(run)


def end_strays(place: Workplace) -> None:
    """End processes of attempts that no longer run. A trainer may have left some behind, and so may the node of another
    card, if it hangs: ranks of a job on several cards."""
    marks = runs_of(card_mark(place.settings, place.node), CARD_VARIABLE, RANK_VARIABLE)
    if not marks:
        return
    own = frozenset() if place.forks is None else place.forks.marks
    for run in marks - own - {run_mark(token) for token in place.store.cards.tokens(place.node)}:
        log.warning("ending processes that an attempt left behind on %s", place.node)
        end_leftovers(run)


def has_ranks(place: Workplace) -> bool:
    """Whether ranks of a job on several cards run here that the node of another card started."""
    return bool(runs_of(card_mark(place.settings, place.node), RANK_VARIABLE))


STUCK_LEAST_S = 20.0
"""A supervisor may be silent this long with any lease: ending a trainer and all that it started takes time."""


LOOK_MOST_S = 2.0
"""The most that counts as silence between two looks at a supervisor: after a freeze of the node, it can catch up."""


class StuckSupervisors:
    """Finds the supervisors of one node that hang, and ends what they hold.

    If a supervisor's loop has not turned for a lease, its trainer is killed: the lease is over, so the job may run
    elsewhere. A supervisor is a thread and can't be killed: if it still hangs after another lease, the node takes no
    more jobs, lets the other attempts save, and ends. The worker starts another node, which gives the stuck job back.
    """

    def __init__(self, place: Workplace) -> None:
        self._place = place
        self._patience = max(place.settings.lease_s, STUCK_LEAST_S)
        self._silent: dict[int, tuple[float, float]] = {}  # slot -> its last turn, and the seconds watched since
        self._killed: set[str] = set()  # tokens of attempts whose trainer was killed for it
        self._looked_at = place.clock.now()

    def end(self, attempts: Mapping[int, SupervisedAttempt]) -> None:
        """Act on supervisors that were silent too long. `attempts`: slot -> the attempt supervised there."""
        silences = list(self._silences(attempts))
        stuck = [(attempt, silent) for attempt, silent in silences if silent >= self._patience]
        for attempt, silent in stuck:
            if attempt.claim.token not in self._killed:
                self._killed.add(attempt.claim.token)
                _kill_trainer(attempt, silent)
        longest = max((silent for _, silent in stuck), default=0.0)
        if longest < 2 * self._patience:
            return
        if self._place.drain.asked is None:
            self._place.drain.alone = True
            self._place.drain.ask("checkpoint")
            os.kill(os.getpid(), signal.SIGTERM)  # else, if it turns again, the node would stay but take no jobs
            log.error("a supervisor of %s is stuck: the node saves its other jobs, then restarts", self._place.node)
        others = [attempt for attempt, silent in silences if silent < self._patience and not attempt.own.closed]
        if not others or longest > 2 * self._patience + DRAIN_GRACE_S:
            logging.shutdown()  # its last lines say why
            os._exit(1)  # the trainers end when their stdin closes

    def _silences(self, attempts: Mapping[int, SupervisedAttempt]) -> Iterator[tuple[SupervisedAttempt, float]]:
        """How long each supervisor's loop has not turned, counting only time in which this process itself ran."""
        now = self._place.clock.now()
        ran, self._looked_at = min(now - self._looked_at, LOOK_MOST_S), now
        for slot, attempt in attempts.items():
            turned_at, silent = self._silent.get(slot, (0.0, 0.0))
            silent = 0.0 if attempt.own.closed or attempt.own.turned_at != turned_at else silent + ran
            self._silent[slot] = attempt.own.turned_at, silent
            yield attempt, silent


def _kill_trainer(attempt: SupervisedAttempt, silent: float) -> None:
    trainer = attempt.own.trainer
    if trainer is None or trainer.poll() is not None:
        return
    log.error("job %s: its supervisor is stuck, the trainer is killed", attempt.claim.job_id)
    if attempt.own.forced is None:
        attempt.own.forced = Reason.TRAINER_ERROR, f"the supervisor was stuck for {silent:.0f} s"
    try:
        os.killpg(trainer.pid, signal.SIGKILL)
    except OSError as error:
        log.warning("job %s: its trainer could not be killed: %s", attempt.claim.job_id, error)
