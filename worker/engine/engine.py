"""The engine: the only thread of a process that computes. Trainings ask it from their own threads.

Only this thread touches the device, the base or torch's generators. Micro-batches that wait for one base at the same
time pass it together; all other work is done in turn. Which micro-batches meet does not affect what each learns. A few
of many passes are measured: the results decide which jobs may train together.
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
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from loractl.common.errors import LoractlError
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import has_limit, in_a_sentence, is_out_of_memory, release, start_threads
from loractl.worker.data.tokens import TokenRow

from .loss import Backward, Loss, MicroBatch
from .passes.shared import SharedPass
from .streams import RandomStreams

EVERY_S = 5.0
"""Seconds between two measured passes: on a card, measuring waits for all earlier work."""

FIRST = 2
"""Unmeasured first passes of a new group of trainings: they compile, and fill memory for the first time."""


class PassMeter:
    """`tell` gets the tokens, the members and the seconds of a pass: of computing, and of wall-clock time. Only one
    thread at a time may use it."""

    def __init__(self, tell: Callable[[int, int, float, float], None]) -> None:
        self._tell = tell
        self._members, self._seen, self._next = 0, 0, 0.0

    @contextlib.contextmanager
    def around(self, tokens: int, members: int, device: torch.device) -> Iterator[None]:
        """A pass; a failing one does not count."""
        if members != self._members:
            self._members, self._seen, self._next = members, 0, 0.0
        self._seen += 1
        if self._seen <= FIRST or time.monotonic() < self._next:
            yield
            return
        began, computed = _seconds(device), time.process_time()
        yield
        seconds = wall = _seconds(device) - began
        if device.type == "cpu":
            # Other programs' load would look like a cost of the pass. Other threads of ours count as well, so
            # wall-clock time is the upper bound. A time limit is about wall-clock time.
            seconds = min(seconds, (time.process_time() - computed) / torch.get_num_threads())
        self._tell(tokens, members, seconds, wall)
        self._next = time.monotonic() + EVERY_S


def _seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


log = logging.getLogger("loractl.worker")

Answer = TypeVar("Answer")

PATIENCE = 0.05
"""Share of the last pass's time that the next pass waits, idle, for trainings that were in the last one and are on
their way back. A training that takes longer between two micro-batches delays the others by no more than this."""


class ForwardPass(Protocol):
    """How losses and gradients are computed."""

    model: Any
    device: torch.device
    streams: RandomStreams

    @property
    def loss(self) -> Loss:
        """The loss that rows are trained with."""

    def recompute_blocks(self, every: int = 1) -> None:
        """Hold the activations of each block (1), or of every second one (2), only in the backward pass."""

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients. Returns its share of the window's mean loss, in nats, without a graph."""

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        """The loss of one batch of held-out rows, not smoothed and summed over what it counts, for a model in eval
        mode."""

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that pass the model."""


AFTER_A_PASS = 3
"""Pieces of work between two micro-batches: the step, an epoch's end, the next window. A training that asks for more is
evaluating or saving: the others do not wait for that."""

LOOK_S = 0.5
"""How often a training that waits for another's long piece of work checks whether to stop."""


@dataclass(eq=False, kw_only=True)
class _Ask:
    session: Session
    answer: Future[Any] = field(default_factory=Future)


@dataclass(eq=False, kw_only=True)
class _Piece(_Ask):
    work: Callable[[], Any]
    long: bool = False  # it lets others go first from time to time


@dataclass(eq=False, kw_only=True)
class _Learning(_Ask):
    """One training's micro-batch, whose gradients are wanted."""

    forward: ForwardPass
    batch: MicroBatch
    trained: Sequence[torch.nn.Parameter]
    backward: Backward
    loss: torch.Tensor | None = None  # once the gradients exist
    error: BaseException | None = None  # its own, if they do not

    @property
    def tokens(self) -> int:
        return self.forward.tokens(self.batch.rows)

    @property
    def key(self) -> tuple[int, int]:
        """The key shared by those that can pass their base together. It keeps no object alive."""
        forward = self.forward
        return (id(forward.base), forward.recomputes) if isinstance(forward, SharedPass) else (id(forward), 0)


class Engine:
    """Does what sessions ask for, first come, first served. Its thread lives while a session is open.

    What an error holds does not cross threads: its tracebacks become notes. A process with a memory limit continues in
    a new thread after out-of-memory: once oneDNN gets no memory for a kernel, it compiles no more kernels in that
    thread, however much is free later ("could not create a primitive"; torch 2.13).
    """

    def __init__(
        self,
        meter: PassMeter | None = None,
        learned: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
    ) -> None:
        """`meter` measures passes over a shared base; `learned` is called after each pass."""
        self._meter, self._tell_learned, self._patience = meter, learned, patience
        self._changed = threading.Condition()
        self._asks: deque[_Ask] = deque()
        self._sessions: set[Session] = set()
        self._thread: threading.Thread | None = None
        self._worn = False  # the thread hit a limit
        self._last: dict[tuple[int, int], set[Session]] = {}  # the sessions in the last pass of a key
        self._seconds = 0.0  # of the last pass
        self._too_many: int | None = None  # tokens whose pass did not fit these sessions' memory

    @contextlib.contextmanager
    def session(self, device: torch.device) -> Iterator[Session]:
        """A training's session, until the block ends."""
        one = Session(self, RandomStreams(device))
        with self._changed:
            if self._thread is None:
                self._start()
            self._sessions.add(one)
            self._too_many = None
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
        before, self._thread = self._thread, threading.Thread(target=self._serve, name="engine", daemon=True)
        try:
            self._thread.start()
        except (RuntimeError, MemoryError):
            self._thread = before
            raise

    @property
    def here(self) -> bool:
        """Whether this is the engine's thread."""
        return threading.current_thread() is self._thread

    @property
    def waiting(self) -> int:
        """The number of questions whose work has not begun."""
        with self._changed:
            return len(self._asks)

    def withdraw(self, ask: _Ask) -> bool:
        """Withdraw a question whose work has not begun. False: it has."""
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
        ready = not has_limit()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asks or not self._sessions)
                if not self._asks:
                    self._thread = None
                    return
            ready = ready or self._has_threads()
            if ready:
                self._next()
            if self._worn and self._is_replaced():
                return

    def _has_threads(self) -> bool:
        """Start the threads that work here needs. False: no memory is left for them, and all who wait are told so: a
        thread that ended instead would leave them waiting."""
        try:
            start_threads()
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to all who ask
            failed = as_value(error)
        else:
            return True
        with self._changed:
            waiting = [*self._asks]
            self._asks.clear()
        for ask in waiting:
            if ask.answer.set_running_or_notify_cancel():  # a stop may have withdrawn it meanwhile
                self._fail(ask, failed)
        return False

    def _is_replaced(self) -> bool:
        """Whether another thread goes on, without what this one holds. Where none can start, this one does.

        It starts once this one has ended: glibc gives a new thread the heap of one that has, else one of its own, and
        the holes in the old heap would count in the limit without being of use.
        """
        self._worn = False
        worn = f"/proc/self/task/{threading.get_native_id()}"

        def relay() -> None:
            while Path(worn).exists():
                time.sleep(0.001)
            try:
                self._start()
            except (RuntimeError, MemoryError) as error:
                log.warning("the engine keeps its thread: %s", error)
                self._serve()

        before, self._thread = self._thread, threading.Thread(target=relay, name="engine", daemon=True)
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            self._thread = before
            log.warning("the engine keeps its thread: %s", error)
            return False
        return True

    def _next(self, *, within: bool = False) -> None:
        """Do the first waiting piece of work; `within` a long one, only short ones."""
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
        """Give back memory after a failure, and this thread if a limit was hit."""
        self._worn = self._worn or has_limit()
        try:
            release()
        except RuntimeError as error:  # a failed card refuses this, too: the next work there reports it
            log.warning("memory is not given back: %s", in_a_sentence(error))

    def pause(self) -> None:
        """Within a long piece of work, between two of its parts: let others' work go first."""
        if not self.here:
            return
        streams, waiting = RandomStreams.at_work(), self.waiting
        with _no_modes():
            for _ in range(waiting):  # not later ones: the long one must make progress, too
                self._next_within()
        if streams is not None:
            streams.take_over()

    def _next_within(self) -> None:
        """In a process with a memory limit, do it in a separate thread: out-of-memory then does not wear the thread in
        which the long piece continues."""
        if not has_limit():
            self._next(within=True)
            return
        outer, worn = self._thread, self._worn

        def work() -> None:
            start_threads()
            self._next(within=True)

        self._thread = threading.Thread(target=work, name="engine", daemon=True)
        try:
            self._thread.start()
            self._thread.join()
        finally:  # where none can start, the piece fails, and this thread is the engine's again
            self._thread, self._worn = outer, worn

    def _gather(self, together: list[_Learning]) -> bool:
        """Add the sessions that wait with a micro-batch, and those about to bring one. False: this thread is worn, and
        they wait again."""
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
        # The gradients of a window's earlier micro-batches are set aside: a failing pass leaves partial gradients, and
        # is tried again.
        before = [[parameter.grad for parameter in one.trained] for one in group]
        self._learn_anew(group)
        for one, gradients in zip(group, before, strict=True):
            for parameter, gradient in zip(one.trained, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _learn_anew(self, group: list[_Learning]) -> None:
        """In one pass; if that fails, each half in its own: only a training that fails alone has failed."""
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
        self._release()  # outside the handler: the error's traceback holds the tensors of the pass
        half = len(group) // 2
        self._learn_anew(group[:half])
        self._learn_anew(group[half:])


class Session:
    """One training's session with an engine. Any thread may ask; each question is answered once its work is done."""

    def __init__(self, engine: Engine, streams: RandomStreams) -> None:
        self._engine = engine
        self.streams = streams  # from which the training draws, in its steps too

    def run(self, work: Callable[[], Answer]) -> Answer:
        """Do a piece of work in the engine's thread with this training's streams. Returns or raises what it does."""
        if self._engine.here:
            return work()
        return self._ask(_Piece(session=self, work=work))

    def run_long(self, work: Callable[[], Answer], meanwhile: Callable[[], None]) -> Answer:
        """The same for a long piece of work that pauses. Long ones are done one after the other; while this one waits
        for others `meanwhile` is called: if that raises, the error comes through, and the work is not done."""
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
        """Within a piece of work: let others go first. Elsewhere it does nothing."""
        self._engine.pause()

    def learn(
        self,
        forward: ForwardPass,
        batch: MicroBatch,
        trained: Sequence[torch.nn.Parameter],
        backward: Backward,
    ) -> torch.Tensor:
        """Leave a micro-batch's gradients, in a pass with those of others. Returns the loss like `ForwardPass.learn`,
        without waiting for the device."""
        made = _Learning(session=self, forward=forward, batch=batch, trained=trained, backward=backward)
        loss: torch.Tensor = self._ask(made)
        return loss

    def _ask(self, ask: _Ask) -> Any:
        self._engine.put(ask)
        return ask.answer.result()


def as_value(error: BaseException) -> BaseException:
    """The error in a form that may cross threads: each traceback becomes a note, and what its frames held is freed. Our
    own errors say it all in their sentence."""
    one: BaseException | None = error
    while one is not None and one.__traceback__ is not None:
        if not isinstance(one, (TrainingFailed, LoractlError)):
            with contextlib.suppress(MemoryError):  # then the frames are left out
                frames = "".join(traceback.format_tb(one.__traceback__))
                one.add_note(f"In the engine's thread:\n{frames}")
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Without the modes of the surrounding long piece of work."""
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
    """As if no autocast had begun in this thread. Casts of weights are cached until the outermost autocast ends, even a
    disabled one: a step within it would change what was cast."""
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
    """Those that can pass their base together, as many as have fitted; one that can't is alone."""
    alike: dict[tuple[int, int], list[_Learning]] = {}
    for one in learnings:
        alike.setdefault(one.key, []).append(one)
    return [part for group in alike.values() for part in _within(group, too_many)]


def _within(group: Sequence[_Learning], too_many: int | None) -> list[list[_Learning]]:
    """The same in parts, each with fewer tokens than `too_many` if it has more than one training."""
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
