"""The engine: the only thread of a process that computes. Trainings ask it from their own threads.

Only this thread touches the device, the base or torch's generators.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from loractl.common.errors import LoractlError
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import has_limit, in_a_sentence, is_out_of_memory, release, start_threads

from .loss import Backward, MicroBatch
from .passes.forward import ForwardPass
from .streams import RandomStreams

log = logging.getLogger("loractl.worker")

Answer = TypeVar("Answer")

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


class Engine:
    """Does what sessions ask for, first come, first served. Its thread lives while a session is open.

    What an error holds does not cross threads: its tracebacks become notes. A process with a memory limit continues in
    a new thread after out-of-memory: once oneDNN gets no memory for a kernel, it compiles no more kernels in that
    thread, however much is free later ("could not create a primitive"; torch 2.13).
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asks: deque[_Ask] = deque()
        self._sessions: set[Session] = set()
        self._thread: threading.Thread | None = None
        self._worn = False  # the thread hit a limit

    @contextlib.contextmanager
    def session(self, device: torch.device) -> Iterator[Session]:
        """A training's session, until the block ends."""
        one = Session(self, RandomStreams(device))
        with self._changed:
            if self._thread is None:
                self._start()
            self._sessions.add(one)
        try:
            yield one
        finally:
            with self._changed:
                self._sessions.discard(one)
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
        self._learn(ask)

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

    def _learn(self, one: _Learning) -> None:
        if not one.answer.set_running_or_notify_cancel():
            return
        try:
            one.session.streams.take_over()
            loss = one.forward.learn(one.batch, one.backward)
        except BaseException as error:  # noqa: BLE001  whatever it is, it belongs to who has asked
            failed = as_value(error)
        else:
            one.answer.set_result(loss)
            return
        self._fail(one, failed)


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
        """Leave a micro-batch's gradients, and return the loss like `ForwardPass.learn`,
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
