"""Trainings of one engine that take a step when a measurement asks for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class _Over(Exception):
    """No more steps are asked for."""


class Steps:
    """Trainings, each in a thread of its own; a step of all in one pass, or of each in its turn."""

    def __init__(self, device: Any, make: Sequence[Callable[[Any], Any]], *, together: bool = True) -> None:
        """`make`: given its session, makes a training loop, in one piece of work."""
        from loractl.worker.engine.engine import Engine

        self._device, self._together = device, together
        self._engine = Engine()
        self._go, self._there = [threading.Semaphore(0) for _ in make], threading.Semaphore(0)
        self._over, self._error = False, list[BaseException]()
        self.loops: dict[int, Any] = {}
        self._threads = [threading.Thread(target=self._train, args=(n, one), daemon=True) for n, one in enumerate(make)]
        for thread in self._threads:
            thread.start()
            self._wait(1)

    def step(self) -> None:
        """Let each learn from one micro-batch and take its step. Raises what one of them raised."""
        for number, go in enumerate(self._go):
            go.release()
            if not self._together or number == len(self._go) - 1:
                self._wait(len(self._go) if self._together else 1)

    def run(self, work: Callable[[Any], Any], number: int = 0) -> Any:
        """What a piece of work with a training's loop returns."""
        loop = self.loops[number]
        return loop.session.run(lambda: work(loop))

    def close(self) -> None:
        """End the trainings, and let go of what they hold."""
        self._over = True
        for go in self._go:
            go.release()
        for thread in self._threads:
            thread.join()
        self.loops.clear()

    def _wait(self, count: int) -> None:
        for _ in range(count):
            self._there.acquire()
        if self._error:
            raise self._error[0]

    def _train(self, number: int, make: Callable[[Any], Any]) -> None:
        try:
            with self._engine.session(self._device) as session:
                loop, learn = make(session), session.learn
                self.loops[number] = loop

                def gated(*of: Any) -> Any:
                    self._there.release()
                    self._go[number].acquire()
                    if self._over:
                        raise _Over
                    return learn(*of)

                session.learn = gated  # type: ignore[method-assign]
                loop.run()
        except _Over:
            pass
        except BaseException as error:  # noqa: BLE001  raised where the step was asked for
            self._error.append(error)
        finally:
            self._there.release()


@contextlib.contextmanager
def steps_of(device: Any, *make: Callable[[Any], Any], together: bool = True) -> Iterator[Steps]:
    """Trainings until the block ends."""
    steps = Steps(device, make, together=together)
    try:
        yield steps
    finally:
        steps.close()
