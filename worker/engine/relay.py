"""A relay: the trainings of one process, each in a thread of its own, of which one computes at a time.

A training goes from its data to its report in its own thread, as it would alone. What it does before and after its
steps it does in slices, between which the others have their turns. Their steps they take together, as a pack.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch

from .helpers import give_up_helpers
from .member import PackMember
from .meter import PassMeter
from .pack import Ending, Pack
from .streams import RandomStreams


class Relay:
    """Who computes now, and who is next: first come, first served."""

    def __init__(self, meter: PassMeter | None = None, learned: Callable[[], None] = lambda: None) -> None:
        """`learned` is called after each step of the pack, by whoever leads it."""
        self.pack = Pack(meter)
        self._learned = learned
        self._changed = threading.Condition()
        self._holder: Leg | None = None
        self._queue: deque[Leg] = deque()
        self._leader: Leg | None = None  # who takes the pack's steps
        self._endings: dict[int, Ending] = {}  # of members whose thread has not seen it yet

    @contextlib.contextmanager
    def leg(self, device: torch.device) -> Iterator[Leg]:
        """Compute in this thread until the block ends, wherever it does not let others go first."""
        one = Leg(self, RandomStreams(device))
        self._take(one)
        try:
            yield one
        finally:
            self._give()

    def _take(self, leg: Leg) -> None:
        with self._changed:
            self._queue.append(leg)
            self._changed.wait_for(lambda: self._holder is None and self._queue[0] is leg)
            self._holder = self._queue.popleft()
        leg.streams.take_over()

    def _give(self) -> None:
        give_up_helpers()
        with self._changed:
            self._holder = None
            self._changed.notify_all()

    def _pause(self, leg: Leg) -> None:
        with self._changed:
            alone = not self._queue
        if not alone:
            self._give()
            self._take(leg)

    def _train(self, leg: Leg, member: PackMember) -> None:
        self.pack.join(member)
        try:
            while id(member) not in self._endings:
                if self._leader in (None, leg):
                    self._lead(leg)
                    self._pause(leg)
                else:
                    self._wait(leg, member)
        finally:
            if self._leader is leg:
                self._follow(None)  # the next that has its turn goes on with the others
        ending = self._endings.pop(id(member))
        leg.streams.take_over()
        try:
            if ending.error is not None:
                raise ending.error
        finally:
            del ending  # the error's traceback holds this frame: it would keep all of the training

    def _lead(self, leg: Leg) -> None:
        """Take a step of all."""
        self._leader = leg
        endings = self.pack.step()
        self._learned()
        if endings:
            with self._changed:
                self._endings |= {id(ending.member): ending for ending in endings}
                self._changed.notify_all()

    def _follow(self, leader: Leg | None) -> None:
        with self._changed:
            self._leader = leader
            self._changed.notify_all()

    def _wait(self, leg: Leg, member: PackMember) -> None:
        """Let others compute until the member has ended, or nobody leads the pack any more."""
        self._give()
        with self._changed:
            self._changed.wait_for(lambda: id(member) in self._endings or self._leader is None)
        self._take(leg)


class Leg:
    """One training's part in the relay. Only the thread that has it may call it."""

    def __init__(self, relay: Relay, streams: RandomStreams) -> None:
        self._relay = relay
        self.streams = streams  # that the training draws from, in its steps too

    def pause(self) -> None:
        """Let the others that wait go first. Call it between two pieces of work, outside of any mode of the process."""
        self._relay._pause(self)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Do what neither computes nor draws random numbers, and let others compute meanwhile."""
        self._relay._give()
        try:
            yield
        finally:
            self._relay._take(self)

    def train(self, member: PackMember) -> None:
        """Train a member to its end, in the pack of all. What it raises is its own."""
        self._relay._train(self, member)


def solo_leg(device: torch.device) -> Leg:
    """The part of a training that has its process to itself."""
    return Leg(Relay(), RandomStreams(device))
