"""What a worker says, line by line, with the times at which it said it."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

OVER = r"job \d+ \S+: (failed|cancelled|queued)"
"""A job that ended otherwise than well, or that has to begin again."""


class WorkerLines:
    """A worker with some options. It ends with the block."""

    def __init__(self, environment: Mapping[str, str], *options: str, patience_s: float) -> None:
        command = [str(Path(sys.executable).with_name("loractl")), "worker", *options]
        self._deadline = time.monotonic() + patience_s
        self._said: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        self._can_fork = threading.Event()
        self._process = subprocess.Popen(
            command, env=dict(environment), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> WorkerLines:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(2):
            self._process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def wait_for_fork_server(self) -> None:
        if not self._can_fork.wait(timeout=self._left()):
            raise TimeoutError("no fork server came")

    def first_step(self) -> float:
        """Seconds from the next claim of a job to its first step, once the job has succeeded."""
        claimed = self._when("attempt 1 with")
        stepped = self._when("step 1 of")
        self._when(r"job \d+ \S+: succeeded")
        return stepped - claimed

    def _when(self, pattern: str) -> float:
        """The time of the next line like this. Raises RuntimeError for a job that ends otherwise than well."""
        while True:
            try:
                at, line = self._said.get(timeout=self._left())
            except queue.Empty:
                raise TimeoutError(f"the worker did not say: {pattern}") from None
            if re.search(pattern, line):
                return at
            if re.search(OVER, line):
                raise RuntimeError(line.strip())

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._said.put((time.perf_counter(), line))
            if "the fork server is ready" in line:
                self._can_fork.set()
