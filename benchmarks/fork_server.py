"""Trainers by fork against new processes: python -m benchmarks.fork_server [MODEL] [ATTEMPTS].

Prints the time from the start of a trainer to its first step and to its end, and the memory that is its own after that
step, at one and at two threads, each way three times in turn. Then ATTEMPTS forks (200), one after another and four
at a time: their adapters must be equal, and what the server holds must not grow. Without a model's folder it
is a tiny random Llama.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import logging.handlers
import os
import queue
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.order import common_environment
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.trainer_process import ChildProcess, kill
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.device.devices import CpuDevice
from loractl.worker.device.occupancy import JOB_VARIABLE, RUN_VARIABLE, run_mark
from loractl.worker.node.fork_server import ForkServer
from loractl.worker.protocol.messages import Ended, Stepped, encode, told_in
from tests.integration.test_out_of_memory import make_order
from tests.models import make_tiny_model, write_helpdesk


@dataclass(frozen=True, kw_only=True)
class Attempt:
    first_step_s: float
    seconds: float
    own: int  # bytes that no other process shares, after the first step
    peak: int  # its resident bytes, as the memory plan learns them
    adapter: str  # its hash


class Bench:
    """A node's place on the processor, with a fork server that is ready."""

    def __init__(self, folder: Path, model: Path, data: Path, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        settings = load_settings({"LORACTL_HOME": str(folder / "home")})
        self._folder, self._model, self._data = folder, model, data
        self._numbers = itertools.count(1)
        self._place = Workplace(
            settings=settings,
            store=Store(connect(settings)),
            artifacts=StoreClient(settings.artifacts_url),
            device=CpuDevice(total=24 * GIB),
            node="box:0",
            drain=Drain(),
        )
        self._forks = ForkServer(self._place, lambda: False)

    def __enter__(self) -> Bench:
        """With a server that is ready."""
        said: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        log, handler = logging.getLogger("loractl.worker"), logging.handlers.QueueHandler(said)
        log.setLevel(logging.INFO)
        log.addHandler(handler)
        self._forks.start()
        text = said.get(timeout=600).getMessage()
        log.removeHandler(handler)
        assert text.startswith("the fork server is ready"), text
        self._server = psutil.Process(int(text.rpartition(" ")[2]))
        return self

    def __exit__(self, *_: object) -> None:
        self._forks.stop()

    def attempt(self, *, forked: bool) -> Attempt:
        """A training, from its process's start to its end."""
        number = str(next(self._numbers))
        folder = self._folder / number
        order = make_order(folder, self._model, self._data, samples=0, max_steps=2)
        own = {**common_environment(self._place), JOB_VARIABLE: "1", RUN_VARIABLE: run_mark(number)}
        began = time.perf_counter()
        trainer: ChildProcess | None
        trainer = self._forks.fork(own, sys.exit) if forked else self._place.launch(self._place.settings.trainer, own)
        assert trainer is not None and trainer.stdin and trainer.stdout and trainer.stderr
        trainer.stdin.write(encode(order))
        trainer.stdin.flush()
        first, size, ended = 0.0, 0, None
        for line in trainer.stdout:
            message = told_in(line)
            if isinstance(message, Stepped) and not first:
                first = time.perf_counter() - began
                size = psutil.Process(trainer.pid).memory_full_info().uss
            ended = message if isinstance(message, Ended) else ended
        kill(trainer)
        seconds = time.perf_counter() - began
        assert ended is not None and ended.reason == "ok", (ended, trainer.stderr.read())
        for pipe in (trainer.stdout, trainer.stderr):
            pipe.close()
        weights = (folder / "result" / "adapter" / "adapter_model.safetensors").read_bytes()
        assert ended.peaks is not None and ended.peaks.reserved is not None
        return Attempt(
            first_step_s=first,
            seconds=seconds,
            own=size,
            peak=ended.peaks.reserved,
            adapter=hashlib.sha256(weights).hexdigest(),
        )

    def server(self) -> tuple[int, int, int, int]:
        """Of the server: bytes of its own, open files, threads, children."""
        server = self._server
        return server.memory_full_info().uss, server.num_fds(), server.num_threads(), len(server.children())


def compare(bench: Bench, threads: int) -> str:
    """Both ways in turn, so that a slow moment of the machine falls on both. Returns the adapter's hash."""
    found: dict[bool, list[Attempt]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for forked, attempts in found.items():
            attempts.append(bench.attempt(forked=forked))
    for forked, attempts in found.items():
        names = ("first_step_s", "seconds", "own", "peak")
        first, seconds, own, peak = (statistics.median(getattr(one, name) for one in attempts) for name in names)
        way, hashes = "fork" if forked else "new process", {one.adapter[:12] for one in attempts}
        sizes = f"{own / 2**20:12.0f} {peak / 2**20:9.0f}"
        print(f"{threads:7}  {way:12} {first:12.2f} {seconds:9.2f} {sizes}  {' '.join(hashes)}", flush=True)
    (adapter,) = {one.adapter for attempts in found.values() for one in attempts}  # else they are not equal
    return adapter


def repeat(bench: Bench, attempts: int, adapter: str) -> None:
    """Many forks of one server, one after another and four beside each other."""
    before, began = bench.server(), time.perf_counter()
    alone = [bench.attempt(forked=True) for _ in range(attempts // 2)]
    middle = bench.server()
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda _: bench.attempt(forked=True), range(attempts // 2)))
    after, took = bench.server(), time.perf_counter() - began
    assert {one.adapter for one in (*alone, *beside)} == {adapter}
    print(f"{len(alone)} in a row and {len(beside)} beside each other: {took:.0f} s, all adapters equal")
    for number, what in enumerate(("own bytes", "open files", "threads", "children")):
        print(f"the server's {what}: {before[number]:,} -> {middle[number]:,} -> {after[number]:,}")


ROUNDS = 3


def main() -> None:
    """Print the table."""
    named, attempts = sys.argv[1:2], int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory(prefix="lb-") as scratch:
        folder = Path(scratch)
        model = Path(named[0]).absolute() if named else make_tiny_model(folder / "tiny")
        write_helpdesk(folder / "data.jsonl")
        print("threads  trainer      first step, s    end, s  its own, MiB  peak, MiB  adapter")
        for threads in (2, 1):
            with Bench(folder / str(threads), model, folder / "data.jsonl", threads) as bench:
                adapter = compare(bench, threads)
                if threads == 1:
                    repeat(bench, attempts, adapter)


if __name__ == "__main__":
    main()
