"""The trainer process: reads orders from stdin, runs the recipe, reports on stdout.

    python -m loractl.worker.recipe.trainer

With `--spare DEVICE` it imports all it needs and waits until a job takes it (protocol/idle_trainer.py). A process whose
base may stay is a host: while jobs train on it others may join them, and after the last it waits for the next. It ends
when its stdin closes, so a killed supervisor leaves no orphan on the device. Signals are left to the supervisor.
Libraries' output goes to stderr, which becomes the job's log.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, TypeVar

from loractl.common.errors import DataError
from loractl.common.job.status import Reason, Stage
from loractl.worker.base.kernels import load_kernels
from loractl.worker.base.quiet import quieten, tell_once
from loractl.worker.protocol.exit_reason import names_card
from loractl.worker.protocol.idle_trainer import PLACEHOLDER, READY, SPARE, host_name, shared, taken
from loractl.worker.protocol.log_lines import log_line
from loractl.worker.protocol.messages import (
    Ended,
    Learned,
    Passed,
    Release,
    Share,
    Start,
    Stop,
    Take,
    Told,
    encode,
)

from .idle_process import Marks, prepare
from .members import Members, MemberServer, Roster
from .order_desk import MemberOver, OrderDesk, Orders
from .other_ranks import LINK_LOST, OtherRanks

if TYPE_CHECKING:
    from loractl.worker.base.kept.base_cache import BaseCache
    from loractl.worker.base.kept.remains import TrainingRemains
    from loractl.worker.engine.engine import Engine

    from .run import DeviceLimit, Run

Answer = TypeVar("Answer")
Tell = Callable[[Told], None]
Recipe = Callable[[Start, Orders, Tell], Ended]


def main(run: Recipe | None = None) -> int:
    """Serve a job, or as a host several; the exit status is 0 if each job's end could be reported.

    `run`: a recipe other than loractl's own. If it returns how many bytes of a base stay, this process stays.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)  # the supervisor stops us through stdin
    marks = Marks() if PLACEHOLDER in os.environ else None
    commands, channel = _take_pipes()
    desk, lock = OrderDesk(commands), threading.Lock()

    def tell(message: Told) -> None:
        with lock:
            channel.write(encode(message))
            channel.flush()

    def become(name: str, mark: str, line: str) -> None:
        assert marks is not None
        marks.become(name, mark, line)
        with lock:
            channel.write(line)
            channel.flush()

    desk.open()
    if sys.argv[1:2] == [SPARE]:
        prepare(sys.argv[2], _load if run is None else _nothing)
        channel.write(READY)
        channel.flush()
        if not _taken(desk, become):
            return 1
    roster = Roster()
    server: MemberServer = _Host(roster, tell) if run is None else _Other(run)
    members = Members(server, desk, tell, roster)
    while True:
        order = desk.next()
        if isinstance(order, Start) and not members and (order.keep is None or marks is None or not marks.fit):
            order = order.model_copy(update={"keep": None})
            tell((run or _run_alone)(order, desk.of(order), tell))
            return 0
        if isinstance(order, Start):
            members.begin(order)
        elif isinstance(order, MemberOver):
            if not members.finish(order):
                return 0
        elif isinstance(order, Share):
            roster.share(functools.partial(become, host_name(order.mark), order.mark, shared(order.mark)))
        elif isinstance(order, Release) and not members:
            become(host_name(order.mark), order.mark, taken(order.mark))
            roster.shared = False
            if not _taken(desk, become):
                return 1
        else:
            return 1


def _taken(desk: OrderDesk, become: Callable[[str, str, str], None]) -> bool:
    """Wait for a job that takes this process, and belong to it."""
    order = desk.next()
    if isinstance(order, Take):
        become(str(order.job_id), order.mark, taken(order.mark))
    return isinstance(order, Take)


STAYS_AFTER = frozenset(
    {
        Reason.OK,
        Reason.CANCELLED,
        Reason.PRUNED,
        Reason.DRAINED,
        Reason.PREEMPTED,
        Reason.BAD_DATA,
        Reason.DIVERGED,
        Reason.NOT_TRAINED,
        Reason.HOST_LOST,
    }
)
"""Ends of a job that say nothing against its process. After any other end the next job gets a new process."""


LEARNED_S = 10.0
"""Seconds between two signs of micro-batches: a fraction of the time after which the process would be ended."""


class _Host:
    """loractl's own recipe on a kept base: jobs one after another and at the same time."""

    def __init__(self, roster: Roster, tell: Tell) -> None:
        self._roster, self._tell = roster, tell
        self._base_cache: BaseCache | None = None
        self._engine: Engine | None = None
        self._device_limit: DeviceLimit | None = None
        self._remains: dict[int, TrainingRemains] = {}
        self._fault: str | None = None  # why this process ends with its last member
        self._aside: set[int] = set()  # jobs whose end says nothing against it: they failed in another process
        self._learned_at = time.monotonic()  # when that was last reported

    def begin(self, order: Start, *, alone: bool) -> None:
        _load()
        from loractl.worker.base.kept.base_cache import BaseCache
        from loractl.worker.engine.engine import Engine, PassMeter

        from .run import DeviceLimit

        if alone:
            self._base_cache = self._base_cache or BaseCache()
            self._base_cache.begin()
            self._engine = self._engine or Engine(PassMeter(self._passed), self._learned)
            self._device_limit, self._fault = DeviceLimit(), None

    def serve(self, order: Start, orders: Orders, tell: Tell) -> Ended:
        import torch

        from .run import Run

        assert self._base_cache is not None and self._engine is not None and self._device_limit is not None
        roster, device_limit, base_cache = self._roster, self._device_limit, self._base_cache
        with self._engine.session(torch.device(order.device)) as session:
            run = Run(
                order=order, tell=tell, base_cache=base_cache, part=session, roster=roster, device_limit=device_limit
            )
            self._remains[order.job_id] = run.remains
            self._aside.discard(order.job_id)
            ended = _run(run, orders)
            if run.failed_aside:
                self._aside.add(order.job_id)
            if run.card_failed:
                self._fault = self._fault or f"the card failed while job {order.job_id} was there"
            return ended

    def let_go(self, order: Start, ended: Ended) -> str | None:
        assert self._base_cache is not None and self._device_limit is not None
        fault = self._remains.pop(order.job_id).left() or self._fault or self._roster.lost or self._spoilt_by(ended)
        try:
            self._compute(functools.partial(self._forget, order))
        except RuntimeError as error:  # a failed card refuses this, too; the others still report their ends
            fault = fault or f"{type(error).__name__}: {error}".splitlines()[0]
        self._fault = self._fault or fault
        return fault

    def settle(self, order: Start, ended: Ended) -> Ended:
        self._remains.clear()
        self._fault = self._fault or self._roster.lost or self._spoilt_by(ended)
        assert self._base_cache is not None
        size, why = None, self._fault
        if why is None:
            self._device_limit = None
            try:
                size, why = self._compute(self._base_cache.settle)
            except Exception as error:  # noqa: BLE001  whatever it is, the job has ended and this process must go
                why = f"{type(error).__name__}: {error}"
            if size is None:
                line = log_line("trainer", f"its base does not stay: {why}")
                self._roster.write(order.job_id, line, self._tell)
        return ended.model_copy(update={"base_bytes": size})

    def _forget(self, order: Start) -> None:
        """Give back the device memory of a member that left others."""
        from loractl.worker.base.gauge import release

        assert self._base_cache is not None and self._device_limit is not None
        release()
        self._device_limit.take_back(order, self._base_cache.size)

    def _compute(self, work: Callable[[], Answer]) -> Answer:
        """Work of the process itself, in the engine's thread. It draws nothing."""
        import torch

        assert self._engine is not None
        with self._engine.session(torch.device("cpu")) as session:
            return session.run(work)

    def _spoilt_by(self, ended: Ended) -> str | None:
        """What a job's end says against this process."""
        if ended.reason in STAYS_AFTER or ended.job_id in self._aside:
            return None
        return f"job {ended.job_id} ended there with {ended.reason.value}"

    def _learned(self) -> None:
        """Report that micro-batches are learned: a member that does not leave ends the others only if none is."""
        if time.monotonic() >= self._learned_at + LEARNED_S and (job := self._roster.any_job) is not None:
            self._learned_at = time.monotonic()
            self._tell(Learned(job_id=job))

    def _passed(self, tokens: int, members: int, seconds: float, wall: float) -> None:
        if (job := self._roster.any_job) is not None:
            self._tell(Passed(job_id=job, tokens=tokens, members=members, seconds=seconds, wall_seconds=wall))


class _Other:
    """A recipe other than loractl's own, which itself knows what stays."""

    def __init__(self, run: Recipe) -> None:
        self.serve = run
        self._fault: str | None = None

    def begin(self, order: Start, *, alone: bool) -> None:
        self._fault = None if alone else self._fault

    def let_go(self, order: Start, ended: Ended) -> str | None:
        fault = None if ended.base_bytes is not None else f"job {ended.job_id} left something there"
        self._fault = self._fault or fault
        return fault

    def settle(self, order: Start, ended: Ended) -> Ended:
        return ended if self._fault is None else ended.model_copy(update={"base_bytes": None})


def _run_alone(order: Start, orders: Orders, tell: Tell) -> Ended:
    """A job whose process ends with it; on several cards along with the other ranks' processes, which this one
    leads."""
    gang = OtherRanks(order, tell) if order.ranks and order.rank == 0 else None
    _load()
    from .run import Run

    with contextlib.closing(Run(order=order if gang is None else gang.order, tell=tell)) as run:
        ended = _run(run, orders)
    return ended if gang is None else gang.settle(ended)


def _run(run: Run, orders: Orders) -> Ended:
    """Train; every way to fail becomes a reason and a sentence, with the traceback in the log."""
    order = run.order

    def obey() -> None:
        while isinstance(message := orders.get(), Stop):
            if message.save:
                run.save_on_stop.set()
            run.stop.set()

    waiter = threading.Thread(target=obey, name=f"stop of job {order.job_id}", daemon=True)
    run.remains.note_thread(waiter)
    waiter.start()
    try:
        return _trained(run)
    finally:
        orders.put(order)  # a thread that waits there for a stop has nothing more to wait for


def _trained(run: Run) -> Ended:
    from loractl.worker.base.failure import TrainingFailed, explain
    from loractl.worker.engine.ranks.link import is_lost

    from .gang import follow
    from .recipe import train
    from .run import Stopped

    order = run.order

    def ended(reason: Reason, message: str) -> Ended:
        return Ended(job_id=order.job_id, reason=reason, message=message, peaks=run.peaks())

    try:
        run.hold_to(order.memory_limit)
        return train(run) if order.rank == 0 else follow(run)
    except Stopped:
        return ended(Reason.DRAINED if run.save_on_stop.is_set() else Reason.CANCELLED, "stopped when asked to")
    except DataError as error:
        return ended(Reason.BAD_DATA, error.with_hint)
    except TrainingFailed as error:
        if error.__cause__ is not None:  # a library's; without one, the sentence says it all
            run.write("".join(traceback.format_exception(error.__cause__)))
        run.failed_aside = error.aside
        return ended(error.reason, error.sentence).model_copy(update={"withdrawn": error.withdrawn})
    except Exception as error:  # noqa: BLE001  after any error the job's row must say why
        # the last place that can name the failure: the whole traceback goes to the log, the sentence to the job's row
        run.write(traceback.format_exc())
        if order.ranks and is_lost(error):
            return ended(Reason.TRAINER_ERROR, LINK_LOST)
        reason, message = explain(error, own_limit=order.device == "cpu" and order.memory_limit is not None)
        run.card_failed = reason is not Reason.OUT_OF_MEMORY and names_card(str(error))
        if run.card_failed and run.roster.met_by(order.job_id):
            # A kernel's error comes late, and then to every job that computes in the process: only alone does it show
            # whose it is.
            return ended(Reason.HOST_LOST, f"it shared its trainer with other jobs: {message}")
        if reason is Reason.TRAINER_ERROR and Stage.EVALUATING in run.stages:
            reason = Reason.EVALUATION_FAILED
        return ended(reason, message)


def _load() -> None:
    """Import the training stack; a second call only lets warnings be logged again."""
    _import()
    tell_once()


@functools.cache
def _import() -> None:
    gc.disable()  # the imports create a million objects that stay to the end: scanning them costs 1.5 s of CPU
    quieten()
    tell_once()
    load_kernels()
    from . import recipe  # noqa: F401

    gc.freeze()
    gc.enable()


def _nothing() -> None:
    """Another recipe itself imports what it needs."""


def _take_pipes() -> tuple[IO[str], IO[str]]:
    """Keep the protocol's pipes for ourselves: other output goes to stderr, and no library can wait for an answer."""
    sys.stdout.flush()
    commands, channel = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return commands, channel


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the supervisor is gone: nobody is left to report to
        sys.exit(main())
