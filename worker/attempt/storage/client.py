"""The artifact store for a node: its calls run in processes that can be abandoned, with a deadline for silence."""

from __future__ import annotations

import json
import logging
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loractl.common.artifacts import Binding, Manifest
from loractl.common.errors import ServiceUnreachable, WrongStore
from loractl.common.settings import redacted

from .service import as_error, manifest_of

log = logging.getLogger("loractl.worker")

DEADLINE_S = 300.0
"""A call that moves nothing for this long is abandoned: its process is killed, and another tries again. 32 MiB move
between two signs of life, as two parts to S3 or at once to a folder's disk, so either must take 112 kB/s."""

LOOK_S = 0.2
"""Seconds between two checks whether a call is still wanted."""

IDLE = 1
"""Processes kept for the next call: their start takes a good part of a second."""


@dataclass(frozen=True, kw_only=True)
class CallWatch:
    """How a caller waits for a call."""

    deadline_s: float = DEADLINE_S
    slow_s: float = math.inf  # of silence, after which `silent` is called
    silent: Callable[[str], None] = lambda doing: None  # with what the unanswered call does
    going_on: Callable[[], None] = lambda: None  # the call moves again
    over: Callable[[], bool] = lambda: False  # whether the answer is no longer wanted


REMOVAL = CallWatch(deadline_s=10.0)
"""What an attempt has left is removed though it has ended. A store that is silent for so long is abandoned: the slot is
for the next job, and loractl gc removes the rest."""


class StoreClient:
    """The artifact store at a URL. Raises what ArtifactStore raises, and ServiceUnreachable for a call that hangs."""

    def __init__(
        self, url: str, watch: CallWatch | None = None, pool: _Pool | None = None, *, mark: str | None = None
    ) -> None:
        """`mark`: see ArtifactStore."""
        self.url = url.rstrip("/")
        self.mark = mark
        self.watch = watch or CallWatch()
        self._pool = pool or _Pool()

    @property
    def fault(self) -> str | None:
        """Why the last call found another store than the lab's here; None: it did not."""
        return self._pool.fault

    def watched(self, watch: CallWatch) -> StoreClient:
        """The same store for a caller that waits in another way."""
        return StoreClient(self.url, watch, self._pool, mark=self.mark)

    def make_ready(self) -> None:
        """Start a process for the next call, so that it need not wait. If none can be started, the next call says
        so."""
        try:
            self._pool.give(self._pool.take())
        except (OSError, RuntimeError) as error:  # no memory for a process, or no thread for its pipe
            log.warning("no process for the artifact store could be made ahead: %s", error)

    def check(self) -> None:
        """See ArtifactStore."""
        self._call("check")

    def fetch_dataset(self, uri: str, sha256: str, folder: Path) -> Path:
        """See ArtifactStore."""
        return Path(self._call("fetch_dataset", uri, sha256, str(folder)))

    def pull(self, stored: Binding, target: Path, part: str = "") -> Manifest:
        """Copy its files that begin with `part` into `target`, verified, under the rest of their names."""
        return manifest_of(self._call("pull", vars(stored), str(target), part))

    def put_result(self, folder: Path, prefix: str) -> Manifest:
        """See ArtifactStore."""
        return manifest_of(self._call("put_result", str(folder), prefix))

    def remove_checkpoint(self, prefix: str) -> None:
        """See ArtifactStore."""
        self._call("remove_checkpoint", prefix)

    def remove_checkpoints(self, job_id: int, attempt: int) -> None:
        """See ArtifactStore."""
        self._call("remove_checkpoints", job_id, attempt)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            answer = self._ask(name, *arguments)
        except WrongStore as error:
            self._pool.fault = error.sentence
            raise
        self._pool.fault, self._pool.is_own = None, not self.url.startswith("file:")
        return answer

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            process = self._pool.take()
        except (OSError, RuntimeError) as error:  # as in make_ready: temporary, and no fault of what is stored
            raise _unreachable(self.url, f"no process could be started for it: {error}") from error
        try:
            named = {"url": self.url, "mark": self.mark, "is_own": self._pool.is_own}
            answer = process.ask({**named, "call": name, "arguments": arguments}, self.watch)
        except BaseException:
            process.leave()
            raise
        self._pool.give(process)
        if "error" in answer:
            raise as_error(answer["error"])
        return answer["value"]


class _Pool:
    """Processes without a call, and what the last call found."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.is_own = False  # whether it is a bucket that has the mark
        self._lock = threading.Lock()
        self._idle: list[_StoreProcess] = []

    def take(self) -> _StoreProcess:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
        return _StoreProcess()

    def give(self, process: _StoreProcess) -> None:
        with self._lock:
            if len(self._idle) < IDLE:
                self._idle.append(process)
                return
        process.leave()


class _StoreProcess:
    """One process and its pipes. It ends with its stdin, and so with this process, unless its call hangs in the kernel:
    then as soon as the kernel returns."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loractl.worker.attempt.storage"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def leave(self) -> None:
        """Kill it without waiting for its end: it may hang where no signal reaches it."""
        self._process.kill()

    def ask(self, order: dict[str, Any], watch: CallWatch) -> dict[str, Any]:
        """Its answer to an order. Raises ServiceUnreachable if it is silent for too long, ends, or is no longer
        wanted."""
        self._send(order, order["url"])
        doing, heard, told = "", time.monotonic(), False
        while True:
            try:
                line = self._answers.get(timeout=LOOK_S)
            except queue.Empty:
                silent = time.monotonic() - heard
                if watch.over():
                    raise _unreachable(order["url"], f"{doing or order['call']} was given up") from None
                if silent > watch.deadline_s:
                    what = doing or order["call"]
                    raise _unreachable(order["url"], f"{what} had no answer for {silent:.0f} s") from None
                if silent > watch.slow_s and doing and not told:
                    told = True
                    watch.silent(f"{doing} has had no answer for {silent:.0f} s")
                continue
            if line is None:
                raise _unreachable(order["url"], f"the process of {doing or order['call']} has ended")
            heard = time.monotonic()
            if told:
                told = False
                watch.going_on()
            answer: dict[str, Any] = json.loads(line)
            if "doing" not in answer:
                return answer
            doing = answer["doing"]

    def _send(self, order: dict[str, Any], url: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _unreachable(url, "its process has ended") from None


def _unreachable(url: str, why: str) -> ServiceUnreachable:
    return ServiceUnreachable("the artifact store", redacted(url), "LORACTL_ARTIFACTS_URL", why)


def _read(pipe: IO[str], answers: queue.SimpleQueue[str | None]) -> None:
    for line in pipe:
        answers.put(line)
    answers.put(None)
