"""The engine: the one thread of a process that computes. Trainings ask it from threads of their own.

Nothing but this thread touches the device, the base or torch's generators. Micro-batches that wait for one base at the
same time go through it in one pass; all else that is asked for is done in turn. Which ones meet changes nothing of what
each learns.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from loractl.common.errors import LoractlError
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import has_limit, in_a_sentence, is_out_of_memory, release, start_threads
from loractl.worker.data.tokens import TokenRow

from .loss import Backward, Loss, MicroBatch
from .meter import PassMeter
from .passes.shared import SharedPass
from .streams import RandomStreams

log = logging.getLogger("loractl.worker")

Answer = TypeVar("Answer")

PATIENCE = 0.05
"""Share of the last pass for which the next one waits, idle, for trainings that were in the last one and are on their
way back. Who takes longer than that between two micro-batches holds the others up by no more."""


class ForwardPass(Protocol):
    """How losses and gradients are computed."""

    model: Any
    device: torch.device
    streams: RandomStreams

    @property
    def loss(self) -> Loss:
        """What is learned from rows."""

    def recompute_blocks(self, every: int = 1) -> None:
        """Hold the activations of each block (1), or of every second one (2), in the backward pass alone."""

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients. Returns its share of the window's mean loss, in nats, without a graph."""

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        """The loss of one batch of held-out rows, not smoothed and summed over what it counts, for a model in eval
        mode."""

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that pass the model."""


AFTER_A_PASS = 3
"""Pieces of work between two micro-batches: the step, an epoch's end, the next window. Who asks for more is evaluated,
or saves: the others do not wait for that."""

LOOK_S = 0.5
"""How often who waits for a long piece of work of another looks whether it is to stop."""


@dataclass(eq=False, kw_only=True)
class _Ask:
    session: Session
    answer: Future[Any] = field(default_factory=Future)


@dataclass(eq=False, kw_only=True)
class _Piece(_Ask):
    work: Callable[[], Any]
    long: bool = False  # it lets others go first now and then


@dataclass(eq=False, kw_only=True)
class _Learning(_Ask):
    """One training's micro-batch, of which the gradients are to be left."""

    forward: ForwardPass
    batch: MicroBatch
    trained: Sequence[torch.nn.Parameter]
    backward: Backward
    loss: torch.Tensor | None = None  # once the gradients are there
    error: BaseException | None = None  # its own, where they are not

    @property
    def tokens(self) -> int:
        return self.forward.tokens(self.batch.rows)

    @property
    def key(self) -> tuple[int, int]:
        """What those have in common that can pass their base together. It holds nothing."""
        forward = self.forward
        return (id(forward.base), forward.recomputes) if isinstance(forward, SharedPass) else (id(forward), 0)


class Engine:
    """Does what sessions ask for, first come, first served. Its thread lives while one is open.

    What an error holds does not cross threads: it comes without tracebacks, which are notes of it. A process that is
    held to a limit goes on in a new thread after out-of-memory: oneDNN compiles no more kernels in a thread where it
    once got no memory for one, however much is free later ("could not create a primitive"; torch 2.13).
    """

    def __init__(
        self,
        meter: PassMeter | None = None,
        learned: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
    ) -> None:
        """`meter` is asked to measure passes over a shared base; `learned` is called after each pass."""
        self._meter, self._tell_learned, self._patience = meter, learned, patience
        self._changed = threading.Condition()
        self._asks: deque[_Ask] = deque()
        self._sessions: set[Session] = set()
        self._thread: threading.Thread | None = None
        self._worn = False  # the thread met a limit
        self._last: dict[tuple[int, int], set[Session]] = {}  # who was in the last pass of a key
        self._seconds = 0.0  # that the last pass took
        self._too_many: int | None = None  # tokens for whose pass these sessions had no memory

    @contextlib.contextmanager
    def session(self, device: torch.device) -> Iterator[Session]:
        """A training's part, until the block ends."""
        one = Session(self, RandomStreams(device))
        with self._changed:
            self._sessions.add(one)
            self._too_many = None
            if self._thread is None:
                self._start()
        try:
            yield one
        finally:
            with self._changed:
                self._sessions.discard(one)
                self._too_many = None
                for together in self._last.values():
                    together.discard(one)
                one.streams.over = True
                self._changed.notify_all()

    def _start(self) -> None:
        # daemon: a process whose main thread fails must end
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def here(self) -> bool:
        """Whether this is the engine's thread."""
        return threading.current_thread() is self._thread

    @property
    def waiting(self) -> int:
        """How many ask for something that has not begun."""
        with self._changed:
            return len(self._asks)

    def withdraw(self, ask: _Ask) -> bool:
        """Take a question back that has not begun. False: it has."""
        with self._changed:
            if not ask.answer.cancel():
                return False
            with contextlib.suppress(ValueError):
                self._asks.remove(ask)
            return True

    def put(self, ask: _Ask) -> None:
        """Let an open session's question wait for its turn."""
        with self._changed:
            if ask.session not in self._sessions:
                raise RuntimeError("a session that is over asked its engine")
            self._asks.append(ask)
            self._changed.notify_all()

    def _serve(self) -> None:
        if has_limit():
            start_threads()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asks or not self._sessions)
                if not self._asks:
                    self._thread = None
                    return
            self._next()
            if self._worn:
                self._worn = False
                self._start()
                return

    def _next(self, *, within: bool = False) -> None:
        """Do the first thing that waits; `within` a long one none but short ones."""
        with self._changed:
            ask = next((one for one in self._asks if not (within and _is_long(one))), None)
            if ask is None:
                return
            self._asks.remove(ask)
        if isinstance(ask, _Piece):
            self._do(ask)
            return
        assert isinstance(ask, _Learning)
        together = [ask]
        try:
            if self._gather(together):
                self._learn(together)
        except BaseException as error:  # noqa: BLE001  like that of a card that fails: it belongs to all of them
            failed = as_value(error)
            for one in together:
                if not one.answer.done():
                    one.answer.set_exception(failed)

    def _do(self, piece: _Piece) -> None:
        if not piece.answer.set_running_or_notify_cancel():
            return
        try:
            piece.session.streams.take_over()
            answer = piece.work()
        except BaseException as error:  # noqa: BLE001  whatever it is, it belongs to who has asked
            failed = as_value(error)
        else:
            piece.answer.set_result(answer)
            return
        self._fail(piece, failed)

    def _fail(self, ask: _Ask, error: BaseException) -> None:
        ask.answer.set_exception(error)
        if is_out_of_memory(error):
            self._release()  # no traceback holds the tensors any more

    def _release(self) -> None:
        """Give back memory after a failure, and this thread where a limit was met."""
        self._worn = self._worn or has_limit()
        try:
            release()
        except RuntimeError as error:  # a card that has failed refuses this, too: what follows there says so
            log.warning("memory is not given back: %s", in_a_sentence(error))

    def pause(self) -> None:
        """Within a long piece of work, between two of its parts: let what others ask for go first."""
        if not self.here:
            return
        streams, waiting = RandomStreams.at_work(), self.waiting
        with _no_modes():
            for _ in range(waiting):  # not those that come meanwhile: the long one gets on, too
                self._next_within()
        if streams is not None:
            streams.take_over()

    def _next_within(self) -> None:
        """In a process that is held to a limit in a thread that ends: whoever is out of memory does not wear the one
        that the long piece goes on in."""
        if not has_limit():
            self._next(within=True)
            return
        outer, worn = self._thread, self._worn

        def work() -> None:
            start_threads()
            self._next(within=True)

        self._thread = threading.Thread(target=work, name="engine", daemon=True)
        self._thread.start()
        self._thread.join()
        self._thread, self._worn = outer, worn

    def _gather(self, together: list[_Learning]) -> bool:
        """Add who else waits with a micro-batch, and who is on the way with one. False: this thread is worn, and they
        wait again."""
        first, began, pieces = together[0], time.monotonic(), Counter[Session]()
        idle, until = self._patience * self._seconds, began + max(1.0, self._patience) * self._seconds
        coming = set(self._last.get(first.key, ()))
        while not self._worn:
            with self._changed:
                for one in [ask for ask in self._asks if isinstance(ask, _Learning)]:
                    self._asks.remove(one)
                    together.append(one)
                coming = {one for one in coming & self._sessions if pieces[one] < AFTER_A_PASS}
                coming -= {one.session for one in together}
                if idle <= 0 or not coming or time.monotonic() > until:
                    return True
                piece = next((ask for ask in self._asks if ask.session in coming and not _is_long(ask)), None)
                if piece is None:
                    waited = time.monotonic()
                    self._changed.wait(idle)
                    idle -= time.monotonic() - waited
                    continue
                self._asks.remove(piece)
            pieces[piece.session] += 1
            if isinstance(piece, _Piece):
                self._do(piece)
        with self._changed:
            self._asks.extendleft(reversed(together))
        together.clear()
        return False

    def _learn(self, learnings: list[_Learning]) -> None:
        began = time.monotonic()
        last: dict[tuple[int, int], set[Session]] = {}
        for one in learnings:
            last.setdefault(one.key, set()).add(one.session)
        for group in _groups(learnings, self._too_many):
            with self._measured(group):
                if len(group) == 1:
                    _learn_alone(group[0])
                else:
                    self._learn_several(group)
        self._last, self._seconds = last, time.monotonic() - began
        self._tell_learned()
        for one in learnings:
            if one.error is None:
                one.answer.set_result(one.loss)
            else:
                self._fail(one, one.error)

    def _measured(self, group: list[_Learning]) -> contextlib.AbstractContextManager[None]:
        forward = group[0].forward
        if self._meter is None or not isinstance(forward, SharedPass):
            return contextlib.nullcontext()
        return self._meter.around(sum(one.tokens for one in group), len(group), forward.device)

    def _learn_several(self, group: list[_Learning]) -> None:
        # What earlier micro-batches of a window left is laid aside: a pass that fails leaves parts, and is tried again.
        before = [[parameter.grad for parameter in one.trained] for one in group]
        self._learn_anew(group)
        for one, gradients in zip(group, before, strict=True):
            for parameter, gradient in zip(one.trained, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _learn_anew(self, group: list[_Learning]) -> None:
        """In one pass; where that fails, each half in one: only who fails alone has failed."""
        for one in group:
            for parameter in one.trained:
                parameter.grad = None
        if len(group) == 1:
            _learn_alone(group[0])
            return
        try:
            _learn_together(group)
            return
        except Exception as error:  # noqa: BLE001  whose it is will show: the others must not end for it
            if is_out_of_memory(error):
                self._too_many = sum(one.tokens for one in group)
            log.warning("a pass of %d trainings is tried again in halves: %s", len(group), in_a_sentence(error))
        self._release()  # outside of the handler: the error's traceback holds the tensors of the pass
        half = len(group) // 2
        self._learn_anew(group[:half])
        self._learn_anew(group[half:])


class Session:
    """One training's part in an engine. Any thread may ask; each question is answered once its work is done."""

    def __init__(self, engine: Engine, streams: RandomStreams) -> None:
        self._engine = engine
        self.streams = streams  # that the training draws from, in its steps too

    def run(self, work: Callable[[], Answer]) -> Answer:
        """What a piece of work returns or raises, done by the engine's thread with this training's streams."""
        if self._engine.here:
            return work()
        return self._ask(_Piece(session=self, work=work))

    def run_long(self, work: Callable[[], Answer], meanwhile: Callable[[], None]) -> Answer:
        """The same for one that takes long, and pauses. Long ones are done one after the other; while this one waits
        for others `meanwhile` is called: what that raises comes through, and nothing is done."""
        if self._engine.here:
            return work()
        ask = _Piece(session=self, work=work, long=True)
        self._engine.put(ask)
        while not ask.answer.running() and not ask.answer.done():
            try:
                meanwhile()
            except BaseException:
                if self._engine.withdraw(ask):
                    raise
            concurrent.futures.wait([ask.answer], LOOK_S)
        return ask.answer.result()

    def pause(self) -> None:
        """Within a piece of work: let others go first. Elsewhere nothing is held up."""
        self._engine.pause()

    def learn(
        self,
        forward: ForwardPass,
        batch: MicroBatch,
        trained: Sequence[torch.nn.Parameter],
        backward: Backward,
    ) -> torch.Tensor:
        """Leave a micro-batch's gradients, in a pass with those of others. Returns the loss as `ForwardPass.learn`
        does, without waiting for the device."""
        made = _Learning(session=self, forward=forward, batch=batch, trained=trained, backward=backward)
        loss: torch.Tensor = self._ask(made)
        return loss

    def _ask(self, ask: _Ask) -> Any:
        self._engine.put(ask)
        return ask.answer.result()


def as_value(error: BaseException) -> BaseException:
    """The error as it may cross threads: each traceback becomes a note, and what its frames held is free. Those of ours
    say all in their sentence."""
    one: BaseException | None = error
    while one is not None and one.__traceback__ is not None:
        if not isinstance(one, (TrainingFailed, LoractlError)):
            with contextlib.suppress(MemoryError):  # then the frames are not told
                frames = "".join(traceback.format_tb(one.__traceback__))
                one.add_note(f"In the engine's thread:\n{frames}")
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Without the modes in which a long piece of work computes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_outside_of_autocast())
        yield


@contextlib.contextmanager
def _outside_of_autocast() -> Iterator[None]:
    """As if no autocast had begun in this thread. The casts of weights are kept to the end of the outermost one, be it
    switched off: beyond a step within that changes what was cast."""
    depth = torch.autocast_increment_nesting() - 1
    while torch.autocast_decrement_nesting() > 0:
        pass
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()


def _is_long(ask: _Ask) -> bool:
    return isinstance(ask, _Piece) and ask.long


def _groups(learnings: Sequence[_Learning], too_many: int | None) -> list[list[_Learning]]:
    """Those that can pass their base together, as many as have had room; who can't is alone."""
    alike: dict[tuple[int, int], list[_Learning]] = {}
    for one in learnings:
        alike.setdefault(one.key, []).append(one)
    return [part for group in alike.values() for part in _within(group, too_many)]


def _within(group: Sequence[_Learning], too_many: int | None) -> list[list[_Learning]]:
    """The same in parts, each of fewer tokens than `too_many` where it is more than one training's."""
    parts: list[list[_Learning]] = [[]]
    for one in group:
        if parts[-1] and too_many is not None and sum(other.tokens for other in (*parts[-1], one)) >= too_many:
            parts.append([])
        parts[-1].append(one)
    return parts


def _learn_together(group: Sequence[_Learning]) -> None:
    shared = [one.forward for one in group if isinstance(one.forward, SharedPass)]
    pieces = [forward.piece(one.batch, one.backward) for forward, one in zip(shared, group, strict=True)]
    losses = shared[0].base.learn(pieces, recomputes=shared[0].recomputes)
    for one, loss in zip(group, losses, strict=True):
        one.loss = loss


def _learn_alone(one: _Learning) -> None:
    try:
        one.forward.streams.take_over()
        one.loss = one.forward.learn(one.batch, one.backward)
    except Exception as error:  # noqa: BLE001  whatever it is, it is this training's own: the others go on
        one.error = as_value(error)
