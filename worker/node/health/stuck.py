"""Supervisors that hang: the trainer is killed or told to stop the job; if that does not help, the node ends."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping

from loractl.common.job.status import Reason
from loractl.worker.attempt.attempt import SupervisedAttempt
from loractl.worker.attempt.stops import DRAIN_GRACE_S
from loractl.worker.attempt.workplace import Workplace

log = logging.getLogger("loractl.worker")


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
            log.error("a supervisor of %s is stuck: the node saves its other jobs, then restarts", self._place.node)
            self._place.drain.end_alone()
            self._place.drain.ask("checkpoint")
            os.kill(os.getpid(), signal.SIGTERM)  # else, if it turns again, the node would stay but take no jobs
        others = [attempt for attempt, silent in silences if silent < self._patience and not attempt.own.closed]
        if not others or longest > 2 * self._patience + DRAIN_GRACE_S:
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
