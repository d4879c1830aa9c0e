"""The slots of a device: threads, one for each job that may share it, that sleep until they are woken."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from loractl.common.errors import ServiceUnreachable
from loractl.common.job.status import Reason
from loractl.common.queue.sender import wake_cards
from loractl.common.store.database import outage
from loractl.common.store.records import Claim, Left
from loractl.worker.attempt.state import AttemptState, begin
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import Watch

from .leftovers import close_if_left

log = logging.getLogger("loractl.worker")

HOLD_BACK_S = 10.0
"""Seconds for which a job is left to the card that the rule gives it to; after that the card counts as stuck."""

STUCK_LEAST_S = 20.0
"""A supervisor may be silent so long with any lease: ending a trainer and all that it started takes a while."""


LOOK_MOST_S = 2.0
"""The most that counts as a supervisor's silence between two looks at it."""


class Slots:
    """Claims what the rule gives this device, and supervises it.

    `changed` is called when what the device can take has changed: a job came or went.
    """

    def __init__(self, place: Workplace, watch: Watch, count: int, changed: Callable[[], None]) -> None:
        self._place = place
        self._watch = watch
        self._changed = changed
        self._woken = threading.Condition()
        self._calls = 0  # how often the slots were woken
        self._closing = False
        self._claiming = threading.Lock()  # two slots would reserve the same bytes twice and lose one
        self._left: dict[str, float] = {}  # node -> since when a job is left to it
        self._attempts: dict[int, AttemptState] = {}  # slot -> what it supervises
        self._silent: dict[int, tuple[float, float]] = {}  # slot -> its last turn, and the seconds looked on since
        self._looked_at = time.monotonic()
        self._threads = [threading.Thread(target=self._serve, args=(n,), name=f"slot {n}") for n in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wake(self) -> bool:
        """Let idle slots look for a job; returns at once. False when none is idle: the message is for others."""
        with self._woken:
            self._calls += 1
            self._woken.notify_all()
        return len(self._attempts) < len(self._threads)

    def close(self) -> None:
        """Wait until every attempt has ended; no slot claims again."""
        with self._woken:
            self._closing = True
            self._woken.notify_all()
        for thread in self._threads:
            thread.join()

    def end_stuck(self) -> None:
        """Kill the trainer of a supervisor that has not turned for a lease; end this process when that frees nothing.

        Its lease is over then, so another node may run the job. The worker starts another node, which gives the jobs
        of this one back.
        """
        patience = max(self._place.settings.lease_s, STUCK_LEAST_S)
        for state, silent in self._silences():
            if silent < patience:
                continue
            job_id, trainer = state.claim.job_id, state.trainer
            if silent < 2 * patience and trainer is not None:
                log.error("job %s: its supervisor is stuck, the trainer is killed", job_id)
                state.forced = Reason.TRAINER_ERROR, f"the supervisor was stuck for {silent:.0f} s"
                try:
                    os.killpg(trainer.pid, signal.SIGKILL)
                except ProcessLookupError:
                    log.debug("job %s: its trainer has ended", job_id)
            elif silent >= 2 * patience:
                log.error("job %s: its supervisor is stuck, this node is started anew", job_id)
                os._exit(1)  # a thread can't be ended from outside; the trainers end with their stdin

    def _silences(self) -> Iterator[tuple[AttemptState, float]]:
        """How long each supervisor has not turned, by the time that this process itself ran."""
        now = time.monotonic()
        ran, self._looked_at = min(now - self._looked_at, LOOK_MOST_S), now
        for slot, state in list(self._attempts.items()):
            turned_at, silent = self._silent.get(slot, (0.0, 0.0))
            silent = 0.0 if state.closed or state.turned_at != turned_at else silent + ran
            self._silent[slot] = state.turned_at, silent
            yield state, silent

    def _serve(self, slot: int) -> None:
        calls = 0
        while not self._closing:
            calls = self._sleep(calls)
            if self._closing:
                return
            try:
                self._take_jobs(slot)
            except Exception as error:
                # a slot that ended in silence would leave a node that looks well and takes no jobs
                if (why := outage(error)) is None:
                    log.exception("slot %s failed; it looks again when it is woken", slot)
                else:
                    log.warning("the database is away: %s", why)
            finally:
                if self._attempts.pop(slot, None) is not None:
                    self._changed()

    def _sleep(self, calls: int) -> int:
        """Wait until there are more calls than these; returns their number."""
        with self._woken:
            self._woken.wait_for(lambda: self._closing or self._calls != calls)
            return self._calls

    def _take_jobs(self, slot: int) -> None:
        """Claim and run until no waiting job is for this device."""
        while self._place.drain.wish is None and (claim := self._claim()) is not None:
            state = self._attempts[slot] = begin(claim, self._place.settings.work_dir)
            self._changed()
            if len(self._threads) > 1:
                self.wake()  # another slot may have room for the next job
            supervise(self._place, state)
            close_if_left(self._place, self._watch, claim)
            del self._attempts[slot]
            self._changed()

    def _claim(self) -> Claim | None:
        """What the rule gives this card now; what it gives another one that does not take it, after a while."""
        with self._claiming:
            while True:
                seen, now = self._watch.look(), time.monotonic()
                distrusted = frozenset(node for node, since in self._left.items() if now - since > HOLD_BACK_S)
                claim = self._place.store.claim(self._place.node, seen.outside, seen.used, distrusted)
                if not isinstance(claim, Left):
                    self._left = {}
                    return claim
                if claim.nodes:
                    self._left = {node: self._left.get(node, now) for node in claim.nodes}
                    self.wake_others(claim.nodes)
                    return None
                time.sleep(0.05)  # another node's claim was faster: look again

    def wake_others(self, nodes: Iterable[str]) -> None:
        """A hint to other cards; without it they look by themselves a few seconds later."""
        try:
            wake_cards(self._place.settings, nodes)
        except ServiceUnreachable as error:
            log.warning("%s", error.sentence)
