"""The engine's thread computes, and no other one: neither in a job's recipe nor in its loop."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loractl.common.job.status import Reason
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine import engine as engines
from loractl.worker.engine.engine import Engine, Session
from loractl.worker.engine.loss import Backward, MicroBatch
from loractl.worker.engine.passes.shared import SharedPass

from .conftest import Recipe

CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Counts what a thread computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keys", [{}, {"method": "qlora", "exact": True}], ids=["lean", "exact, nf4"])
def test_a_recipe_s_own_thread_computes_nothing(recipe: Recipe, tmp_path: Path, keys: dict[str, Any]) -> None:
    with Operators() as here:
        ended, _ = recipe(max_steps=3, eval_steps=2, **keys)
    assert ended.reason is Reason.OK, ended.message
    assert not here.seen


def test_what_a_session_drew_from_is_not_asked_for_once_it_is_over() -> None:
    """Of a card that has failed the state can't be read, or of one that never was here."""
    engine = Engine()
    with engine.session(torch.device("cuda")) as gone:
        gone.run(int)
    with engine.session(CPU) as session:
        assert session.run(int) == 0


def test_who_asks_after_its_session_is_told() -> None:
    with Engine().session(CPU) as session:
        assert session.run(lambda: threading.current_thread().name) == "engine"
    with pytest.raises(RuntimeError, match="session that is over"):
        session.run(time.monotonic)


@pytest.mark.parametrize("fails", ["start_threads", "Thread"], ids=["no memory for its threads", "no thread starts"])
def test_an_engine_that_can_t_replace_its_thread_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """After an out-of-memory under a limit another thread goes on. The members' questions come to an answer anyway."""
    monkeypatch.setattr(engines, "has_limit", lambda: True)
    monkeypatch.setattr(engines, "start_threads", lambda: None)

    def full() -> None:
        raise MemoryError("no room")

    def refuse(*_: Any, **__: Any) -> None:
        tried.set()
        raise RuntimeError("can't allocate memory")

    answers, tried = list[str](), threading.Event()

    def ask(session: Session) -> None:
        try:
            answers.append(str(session.run(lambda: "worked")))
        except (RuntimeError, MemoryError) as error:
            answers.append(str(error))

    engine = Engine()
    with engine.session(CPU) as first, engine.session(CPU) as second:
        first.run(int)
        with pytest.raises(MemoryError), monkeypatch.context() as broken:
            if fails == "Thread":
                broken.setattr(threading.Thread, "start", refuse)
            else:
                broken.setattr(engines, "start_threads", refuse)
            try:
                first.run(full)
            finally:
                if fails == "start_threads":
                    ask(second)
                assert tried.wait(30), "the engine's thread finds that it can't be replaced"
        other = threading.Thread(target=ask, args=(second,), daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive() and answers[-1] == "worked"
    assert answers[:-1] == (["can't allocate memory"] if fails == "start_threads" else [])


class Base:
    """A base whose passes learn nothing, and may fail."""

    def __init__(self, failing: int = 0) -> None:
        self.passes: list[int] = []
        self._failing = failing  # so many of the first passes of several

    def learn(self, pieces: Sequence[Any], *, recomputes: int) -> list[torch.Tensor]:
        self.passes.append(len(pieces))
        if len(pieces) > 1 and self._failing:
            self._failing -= 1
            raise torch.OutOfMemoryError("no room")
        time.sleep(0.01)
        return [torch.zeros(()) for _ in pieces]


class Pass(SharedPass):
    """A training's pass on such a base."""

    def __init__(self, base: Base, session: Session) -> None:
        self.base, self.recomputes, self.device = base, 0, CPU  # type: ignore[assignment]
        self.streams = session.streams

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        return 1

    def piece(self, batch: MicroBatch, backward: Backward) -> Any:
        return batch


def learn(session: Session, forward: Pass) -> None:
    session.learn(forward, MicroBatch(rows=[], learned=1, pieces=1), [], torch.autograd.backward)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def pass_of_two(engine: Engine, base: Base, a: Session, c: Session) -> tuple[Pass, Pass]:
    """Let both learn in one pass."""
    passes = Pass(base, a), Pass(base, c)
    begun = threading.Event()
    hold = in_thread(lambda: a.run(lambda: (begun.set(), wait_for(lambda: engine.waiting == 2))))
    assert begun.wait(30)
    learning = [in_thread(lambda s=s, p=p: learn(s, p)) for s, p in zip((a, c), passes, strict=True)]
    for thread in (hold, *learning):
        thread.join(30)
    return passes


def test_who_is_evaluated_holds_nobody_up() -> None:
    """It was in the last pass, and now asks for one piece of work after the other."""
    engine, base = Engine(), Base()
    with engine.session(CPU) as a, engine.session(CPU) as c:
        forward, _ = pass_of_two(engine, base, a, c)
        done: list[int] = []
        scoring = in_thread(lambda: [c.run(lambda: (time.sleep(0.01), done.append(1))) for _ in range(100)])
        wait_for(lambda: bool(done))
        learn(a, forward)
        assert len(done) < 50
        scoring.join(30)
    assert base.passes[-1] == 1


def test_a_training_that_is_slow_between_its_micro_batches_holds_nobody_up() -> None:
    engine, base = Engine(), Base()
    with engine.session(CPU) as a, engine.session(CPU) as c:
        forward, _ = pass_of_two(engine, base, a, c)
        gone_on = threading.Event()
        slow = in_thread(lambda: gone_on.wait(30))  # c asks for nothing
        for _ in range(3):
            learn(a, forward)
        gone_on.set()
        slow.join(30)
    assert base.passes[-3:] == [1, 1, 1]


def test_a_failure_that_is_nobody_s_own_is_told_to_all_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a card has failed, which then refuses to give memory back."""

    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine, base = Engine(), Base(failing=1)
    monkeypatch.setattr(engines, "release", refuse)
    with engine.session(CPU) as a, engine.session(CPU) as c:
        pass_of_two(engine, base, a, c)
        assert base.passes == [2, 1, 1], "tried again in halves"
        with pytest.raises(MemoryError):
            a.run(lambda: (_ for _ in ()).throw(MemoryError()))
        monkeypatch.setattr(engines.Engine, "_learn", lambda *_: refuse())
        for session in (a, c):
            with pytest.raises(RuntimeError, match="illegal memory access"):
                learn(session, Pass(base, session))
        assert a.run(lambda: 7) == 7


def test_what_was_taken_back_is_held_by_nobody() -> None:
    engine, go_on = Engine(), threading.Event()
    with engine.session(CPU) as a, engine.session(CPU) as b:
        long = in_thread(lambda: a.run_long(lambda: go_on.wait(30), lambda: None))
        wait_for(lambda: engine.waiting == 0)
        tensor = torch.ones(3)
        held = weakref.ref(tensor)

        def stop() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            b.run_long(partial(torch.Tensor.sum, tensor), stop)
        del tensor
        assert engine.waiting == 0 and held() is None
        go_on.set()
        long.join(30)


def test_a_thread_that_met_a_limit_ends_and_not_one_that_only_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_limit", lambda: True)
    engine = Engine()

    def full() -> None:
        raise MemoryError

    with engine.session(CPU) as a, engine.session(CPU) as b:
        first = a.run(threading.get_native_id)
        assert a.run(threading.get_native_id) == first
        with pytest.raises(MemoryError):
            a.run(full)
        second = a.run(threading.get_native_id)
        assert second != first
        told: list[str] = []

        def neighbour() -> None:
            try:
                b.run(full)
            except MemoryError:
                told.append("full")

        def long() -> tuple[int, int]:
            asks = in_thread(neighbour)
            wait_for(lambda: engine.waiting == 1)
            before = threading.get_native_id()
            a.pause()
            asks.join(30)
            return before, threading.get_native_id()

        assert a.run_long(long, lambda: None) == (second, second) and told == ["full"]
        assert a.run(threading.get_native_id) == second


def test_a_long_piece_whose_pause_finds_no_thread_fails_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one for the others' work in the pause, nor one that goes on without what the failure holds."""
    monkeypatch.setattr(engines, "has_limit", lambda: True)
    engine, answers, refused = Engine(), list[str](), list[int]()

    def refuse(*_: Any, **__: Any) -> None:
        refused.append(1)
        raise RuntimeError("can't start new thread")

    with engine.session(CPU) as a, engine.session(CPU) as b:
        a.run(int)
        with monkeypatch.context() as broken:

            def long() -> None:
                in_thread(lambda: answers.append(str(b.run(lambda: 7))))
                wait_for(lambda: engine.waiting == 1)
                broken.setattr(threading.Thread, "start", refuse)
                a.pause()

            with pytest.raises(RuntimeError, match="can't start new thread"):
                a.run_long(long, lambda: None)
            wait_for(lambda: len(refused) == 2)
        threading.Thread(target=lambda: answers.append(str(a.run(lambda: a.run(lambda: 8)))), daemon=True).start()
        wait_for(lambda: len(answers) == 2)
    assert sorted(answers) == ["7", "8"]


def test_a_stop_while_the_engine_has_no_memory_for_its_threads_ends_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who stops withdraws its question after the engine has taken it, and before it has answered it."""
    engine, taken, stopped, told = Engine(), threading.Event(), threading.Event(), list[str]()
    monkeypatch.setattr(engines, "has_limit", lambda: True)

    def full() -> None:
        wait_for(lambda: engine.waiting == 2)
        raise MemoryError("no room")

    def stop() -> None:
        if taken.is_set():
            raise ZeroDivisionError

    def ask(run: Callable[[], object]) -> None:
        try:
            run()
        except (MemoryError, ZeroDivisionError) as error:
            told.append(type(error).__name__)
        finally:
            if len(told) == 2 or told == ["ZeroDivisionError"]:
                stopped.set()

    def between() -> None:
        taken.set()
        assert stopped.wait(30)

    with engine.session(CPU) as a, engine.session(CPU) as b, monkeypatch.context() as broken:
        broken.setattr(engines, "start_threads", full)
        broken.setattr(engines, "release", between)
        asks = [in_thread(lambda: ask(lambda: a.run(int)))]
        wait_for(lambda: engine.waiting == 1)
        asks.append(in_thread(lambda: ask(lambda: b.run_long(int, stop))))
        for one in asks:
            one.join(60)
        broken.undo()
        monkeypatch.setattr(engines, "has_limit", lambda: True)
        monkeypatch.setattr(engines, "start_threads", lambda: None)
        answers = list[int]()
        again = threading.Thread(target=lambda: answers.append(a.run(lambda: 7)), daemon=True)
        again.start()
        again.join(30)
        assert sorted(told) == ["MemoryError", "ZeroDivisionError"] and answers == [7]
