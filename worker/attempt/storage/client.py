"""The artifact store for a node: its calls run in processes that can be abandoned, with a deadline for silence.

A process reads orders on stdin, one JSON object per line, one after the other, and writes answers and progress on
stdout. It ends with its stdin.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loractl.common.artifacts import ArtifactStore, Binding, Manifest, StoredFile
from loractl.common.errors import ArtifactError, NotStorable, ResultTaken, ServiceUnreachable, StoreFailed, WrongStore
from loractl.common.settings import load_settings, redacted

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
        """This store for a caller that waits in another way."""
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
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _unreachable(order["url"], "its process has ended") from None
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


def _unreachable(url: str, why: str) -> ServiceUnreachable:
    return ServiceUnreachable("the artifact store", redacted(url), "LORACTL_ARTIFACTS_URL", why)


def _read(pipe: IO[str], answers: queue.SimpleQueue[str | None]) -> None:
    for line in pipe:
        answers.put(line)
    answers.put(None)


def carry_out(store: ArtifactStore, name: str, arguments: list[Any]) -> Any:
    """Do what the node asks; the answer is JSON. Raises what the store raises."""
    return _CALLS[name](store, *arguments)


def manifest_of(answer: dict[str, Any]) -> Manifest:
    """The manifest that put_result wrote, or of what pull copied."""
    return {name: StoredFile(**file) for name, file in answer.items()}


_KINDS = {ResultTaken: "taken", NotStorable: "not storable", StoreFailed: "failed"}
"""An ArtifactError's kinds, by name."""


def as_answer(error: Exception) -> dict[str, Any]:
    """An error for the pipe."""
    if isinstance(error, WrongStore):
        return {"kind": "wrong store", "facts": [error.facts[1], error.facts[3]]}
    if isinstance(error, ServiceUnreachable):
        return {"kind": "unreachable", "facts": list(error.facts)}
    if isinstance(error, ArtifactError):
        return {"kind": _KINDS.get(type(error), "artifact"), "facts": [error.sentence, error.hint]}
    if isinstance(error, OSError):
        named = error.filename and str(error.filename)
        return {"kind": "os", "facts": [error.errno, error.strerror or str(error), named]}
    return {"kind": "other", "facts": [repr(error)]}


def as_error(answer: dict[str, Any]) -> Exception:
    """The error in an answer."""
    kinds: dict[str, Callable[..., Exception]] = {
        "unreachable": ServiceUnreachable,
        "wrong store": WrongStore,
        "artifact": ArtifactError,
        **{kind: error for error, kind in _KINDS.items()},
        "os": OSError,
    }
    return kinds.get(answer["kind"], RuntimeError)(*answer["facts"])


def _as_json(manifest: Mapping[str, StoredFile]) -> dict[str, Any]:
    return {name: vars(file) for name, file in manifest.items()}


_CALLS: dict[str, Callable[..., Any]] = {
    "check": ArtifactStore.check,
    "fetch_dataset": lambda store, uri, sha256, folder: str(store.fetch_dataset(uri, sha256, Path(folder))),
    "pull": lambda store, stored, target, part: _as_json(store.pull(Binding(**stored), part, Path(target))),
    "put_result": lambda store, folder, prefix: _as_json(store.put_result(Path(folder), prefix)),
    "remove_checkpoint": ArtifactStore.remove_checkpoint,
    "remove_checkpoints": ArtifactStore.remove_checkpoints,
}


TELL_S = 1.0
"""Seconds between two lines that say the same."""


class _Teller:
    """Reports progress; a moved block is a sign of life."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._lock = threading.Lock()  # S3's client reports from its own thread
        self._said = ("", 0.0)

    def doing(self, what: str) -> None:
        now = time.monotonic()
        if what != self._said[0] or now - self._said[1] >= TELL_S:
            self._said = what, now
            self.write({"doing": what})

    def write(self, answer: dict[str, Any]) -> None:
        with self._lock:
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


def main() -> None:
    """Serve the orders until stdin ends."""
    import fsspec  # noqa: F401  any store's calls need it: now, not when one is waited for; the node needs it never

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(orders,), name="orders", daemon=True).start()
    teller, stores, keys = _Teller(answers), dict[tuple[str, str | None], ArtifactStore](), load_settings().s3
    while True:
        order = json.loads(orders.get())
        try:
            if (named := (order["url"], order["mark"])) not in stores:
                stores[named] = ArtifactStore(
                    named[0], doing=teller.doing, keys=keys, mark=named[1], is_own=order["is_own"]
                )
            teller.write({"value": carry_out(stores[named], order["call"], order["arguments"])})
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001  told to the node, which raises it
            if (answer := as_answer(error))["kind"] == "other":
                traceback.print_exc()
            teller.write({"error": answer})


def _read_orders(orders: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)  # the node is gone; the main thread may hang in a call
