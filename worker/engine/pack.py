"""A pack: trainings that go on beside each other on one base in one process, each alone in its fate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory, release

from .loss import MicroBatch
from .member import Course, PackMember
from .meter import PassMeter
from .passes.shared import SharedPass

log = logging.getLogger("loractl.worker")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a member left its pack by itself."""

    member: PackMember
    error: Exception | None  # None: it trained to its end; else what its own computing, callbacks or files raised


@dataclass(eq=False)
class _Seat:
    """A member's place in a pack."""

    member: PackMember
    course: Course
    batch: MicroBatch | None = None  # that it waits to have learned; None: it is at other work
    loss: torch.Tensor | None = None  # of that, once its gradients are there
    error: Exception | None = None

    @property
    def tokens(self) -> int:
        return 0 if self.batch is None else self.member.forward.tokens(self.batch.rows)


class Pack:
    """Members that take their steps together: on a shared base in one pass, else one after the other.

    What a member learns does not depend on the others. Not for several threads: one at a time may call a pack.
    """

    def __init__(self, meter: PassMeter | None = None) -> None:
        """`meter`: is asked to measure passes over a shared base."""
        self._meter = meter
        self._seats: list[_Seat] = []
        self._too_many: int | None = None  # tokens for whose pass these members had no memory

    @property
    def members(self) -> list[PackMember]:
        return [seat.member for seat in self._seats]

    def join(self, member: PackMember) -> None:
        """Begin a member's training; from the next step on it takes part. What its beginning raises, like an
        out-of-memory of its probe, comes through, and the pack is as before."""
        seat = _Seat(member=member, course=member.course())
        member.streams.take_over()
        seat.batch = next(seat.course)
        self._seats.append(seat)
        self._too_many = None

    def leave(self, member: PackMember) -> None:
        """Let a member go between two steps. Nothing of the pack holds its tensors afterwards."""
        (seat,) = [seat for seat in self._seats if seat.member is member]
        self._drop(seat)

    def step(self) -> list[Ending]:
        """Let every member learn from one micro-batch, or do a piece of other work. Returns those that ended in it."""
        for group in self._groups([seat for seat in self._seats if seat.batch is not None]):
            self._learn(group)
        return [ending for seat in list(self._seats) if (ending := self._go_on(seat)) is not None]

    def _go_on(self, seat: _Seat) -> Ending | None:
        """Let one member do what comes after its gradients, up to its next micro-batch or a piece of other work."""
        error, loss, seat.loss = seat.error, seat.loss, None
        if error is None:
            seat.member.streams.take_over()
            try:
                seat.batch = seat.course.send(loss)
                return None
            except StopIteration:
                pass
            except Exception as raised:  # noqa: BLE001  whatever it is, it is this member's own: the others go on
                error = raised
        self._drop(seat)
        return Ending(member=seat.member, error=error)

    def _drop(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        self._too_many = None
        seat.member.streams.take_over()
        seat.course.close()

    def _groups(self, seats: Sequence[_Seat]) -> list[list[_Seat]]:
        """Those that can pass their base together, as many as have had room; who can't is alone."""
        alike: dict[object, list[_Seat]] = {}
        for seat in seats:
            forward = seat.member.forward
            key = (forward.base, forward.recomputes) if isinstance(forward, SharedPass) else seat
            alike.setdefault(key, []).append(seat)
        return [part for group in alike.values() for part in _within(group, self._too_many)]

    def _learn(self, seats: list[_Seat]) -> None:
        """Leave the gradients of one micro-batch of each, and its loss or the error that is its own."""
        forward = seats[0].member.forward
        if self._meter is None or not isinstance(forward, SharedPass):
            self._learn_all(seats)
            return
        with self._meter.around(sum(seat.tokens for seat in seats), len(seats), forward.device):
            self._learn_all(seats)

    def _learn_all(self, seats: list[_Seat]) -> None:
        if len(seats) == 1:
            _learn_alone(seats[0])
            return
        # What earlier micro-batches of a window left is laid aside: a pass that fails leaves parts, and is tried again.
        before = [[parameter.grad for parameter in seat.member.trained] for seat in seats]
        self._learn_anew(seats)
        for seat, gradients in zip(seats, before, strict=True):
            for parameter, gradient in zip(seat.member.trained, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _learn_anew(self, seats: list[_Seat]) -> None:
        """In one pass; where that fails, each half in one: only who fails alone has failed."""
        for seat in seats:
            for parameter in seat.member.trained:
                parameter.grad = None
        if len(seats) == 1:
            _learn_alone(seats[0])
            return
        try:
            _learn_together(seats)
            return
        except Exception as error:  # noqa: BLE001  whose it is will show: the others must not end for it
            if is_out_of_memory(error):
                self._too_many = sum(seat.tokens for seat in seats)
            log.warning("a pass of %d trainings is tried again in halves: %s", len(seats), in_a_sentence(error))
        release()  # outside of the handler: the error's traceback holds the tensors of the pass
        half = len(seats) // 2
        self._learn_anew(seats[:half])
        self._learn_anew(seats[half:])


def _within(seats: Sequence[_Seat], too_many: int | None) -> list[list[_Seat]]:
    """The same in parts, each of fewer tokens than `too_many` where it is more than one seat."""
    parts: list[list[_Seat]] = [[]]
    for seat in seats:
        if parts[-1] and too_many is not None and sum(one.tokens for one in (*parts[-1], seat)) >= too_many:
            parts.append([])
        parts[-1].append(seat)
    return parts


def _learn_together(seats: Sequence[_Seat]) -> None:
    passes = [(seat, *shared) for seat in seats if (shared := _shared(seat)) is not None]
    pieces = [forward.piece(batch, seat.member.optimizer.backward) for seat, forward, batch in passes]
    forward = passes[0][1]
    for seat, loss in zip(seats, forward.base.learn(pieces, recomputes=forward.recomputes), strict=True):
        seat.loss = loss


def _shared(seat: _Seat) -> tuple[SharedPass, MicroBatch] | None:
    forward, batch = seat.member.forward, seat.batch
    return (forward, batch) if isinstance(forward, SharedPass) and batch is not None else None


def _learn_alone(seat: _Seat) -> None:
    member, batch = seat.member, seat.batch
    member.streams.take_over()
    try:
        if batch is not None:
            seat.loss = member.forward.learn(batch, member.optimizer.backward)
    except Exception as error:  # noqa: BLE001  whatever it is, it is this member's own: the others go on
        seat.error = error
