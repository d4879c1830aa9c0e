"""The fork server of a node, seen from the node: it is started, asked for trainers, dropped, replaced."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from loractl.worker.attempt.order import common_environment
from loractl.worker.attempt.trainer_process import KILL_S, ForkedTrainer
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import JOB_VARIABLE, RUN_VARIABLE, end_leftovers
from loractl.worker.protocol.messages import (
    FORK_SERVER,
    PACKET,
    PLACEHOLDER,
    PLACEHOLDER_VALUE,
    READY,
    ForkAnswer,
    ForkRequest,
)

log = logging.getLogger("loractl.worker")

LOOK_S = 0.2
"""Seconds between two looks at the server. A node waits at least this long before it starts its first."""

IMPORT_S = 600.0
"""A server that has not imported everything by then hangs: even a slow disk takes a minute or two at low priority."""

ANSWER_S = 5.0
"""A server answers in a tenth of a second. If it does not within this time or a quarter of a lease, it is dropped."""

FIRST_AGAIN_S, MOST_AGAIN_S = 10.0, 600.0
"""Seconds until the next server is started after one has failed; each failure in a row doubles them."""

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class NotForked(Exception):
    """The server can't be used any more; the message says why."""


@dataclass(eq=False, kw_only=True)
class ServerProcess:
    """A server's process, its socket and its output."""

    process: subprocess.Popen[str]
    connection: socket.socket
    mark: str  # its LORACTL_RUN
    inherited: dict[str, Any]  # what its trainers have from it
    born: float
    ready: bool = False
    last: str = ""  # the last line that it printed

    def read(self) -> None:
        """Keep what it prints out of any job's log."""
        assert self.process.stdout
        with self.process.stdout as printed:
            for line in printed:
                self.last = line.strip() or self.last
                log.debug("the fork server: %s", line.rstrip())

    def is_ready(self) -> bool:
        """Whether it reports now that it has imported everything."""
        return bool(select.select([self.connection], [], [], 0)[0]) and self.connection.recv(PACKET) == READY

    def fork(self, request: ForkRequest, patience_s: float) -> ForkedTrainer:
        """A trainer that shows the attempt's marks. Raises NotForked."""
        self.connection.settimeout(patience_s)
        with contextlib.ExitStack() as undo:
            (stdin, orders), (told, stdout), (printed, stderr) = os.pipe(), os.pipe(), os.pipe()
            streams = _opened(orders, "w"), _opened(told, "r"), _opened(printed, "r")
            for stream in streams:
                undo.callback(stream.close)  # a trainer that is not taken ends with its stdin
            try:
                with _adopting():
                    try:
                        socket.send_fds(self.connection, [request.model_dump_json().encode()], [stdin, stdout, stderr])
                    finally:
                        for descriptor in (stdin, stdout, stderr):
                            os.close(descriptor)
                    answer = ForkAnswer.model_validate_json(self.connection.recv(PACKET))
            except TimeoutError:
                raise NotForked(f"it did not answer within {patience_s:.1f} s") from None
            except (OSError, ValueError) as error:  # ValueError: it has closed the socket
                raise NotForked(f"it did not answer: {error}") from None
            if answer.pid is None:
                raise NotForked(answer.refusal)
            trainer = ForkedTrainer(answer.pid, *streams)
            if not _shows(trainer.pid, request):
                raise NotForked(f"its trainer, process {answer.pid}, is not as it should be")
            undo.pop_all()
        return trainer


def _opened(pipe: int, mode: Literal["r", "w"]) -> IO[str]:
    """A trainer's pipe as `launch` opens it, whatever the locale of the node."""
    return os.fdopen(pipe, mode, encoding="utf-8", errors="replace")


def _shows(pid: int, request: ForkRequest) -> bool:
    """Whether a trainer is this process's child, and a search for the attempt's processes would find it."""
    try:
        trainer = psutil.Process(pid)
        parent, seen = trainer.ppid(), trainer.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return False
    return (parent, seen.get(RUN_VARIABLE), seen.get(JOB_VARIABLE)) == (os.getpid(), request.mark, str(request.job_id))


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Be the parent of descendants that lose theirs, as a trainer does when it is forked. Raises OSError.

    Only for that moment: what trainers leave behind is another's to reap.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "can't adopt a trainer")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class ForkServer:
    """Keeps one fork server, started while the node is not busy.

    `busy`: whether starting one now would compete with a job that starts.
    """

    def __init__(self, place: Workplace, busy: Callable[[], bool]) -> None:
        self._place = place
        self._busy = busy
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._server: ServerProcess | None = None
        self._dropped: queue.SimpleQueue[tuple[ServerProcess, str]] = queue.SimpleQueue()
        self._marks: set[str] = set()
        self._failures = 0  # in a row
        self._next = place.clock.now() + LOOK_S
        self._unkillable: subprocess.Popen[str] | None = None  # a server that even SIGKILL did not end
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = self._place.clock.start(self._run, "fork server")

    def stop(self) -> None:
        """End the server, and start none from now on."""
        self._stopped.set()
        if self._thread is not None:
            self._place.clock.join(self._thread)
        if self._server is not None:
            self._drop(self._server, "the node stops")
        while not self._dropped.empty():
            self._end(self._dropped.get()[0])

    @property
    def marks(self) -> frozenset[str]:
        """Marks of processes that are no attempt's and no strays: of the server."""
        with self._lock:
            return frozenset(self._marks)

    def fork(self, environment: Mapping[str, str], say: Callable[[str], None]) -> ForkedTrainer | None:
        """A trainer with this environment. None: the caller starts one; `say` gets why, unless no server is ready yet.

        A supervisor calls this, so it takes no longer than a heartbeat may be late.
        """
        request = ForkRequest(job_id=int(environment[JOB_VARIABLE]), mark=environment[RUN_VARIABLE])
        patience_s = min(ANSWER_S, self._place.settings.lease_s / 4)
        server = self._server
        if server is None or not server.ready:
            return None
        if server.inherited != _inherited(environment):
            say("the fork server has another environment: a new process is started")
            return None
        try:
            trainer = self._ask(server, request, patience_s)
        except NotForked as error:
            self._drop(server, str(error))
            say(f"the fork server is not used: {error}; a new process is started")
            return None
        self._failures = 0
        log.info("job %s: the trainer is a fork, process %s", request.job_id, trainer.pid)
        return trainer

    def _ask(self, server: ServerProcess, request: ForkRequest, patience_s: float) -> ForkedTrainer:
        """Raises NotForked."""
        if not self._asking.acquire(timeout=patience_s):
            raise NotForked("it does not answer another attempt")
        try:
            return server.fork(request, patience_s)
        finally:
            self._asking.release()

    def _run(self) -> None:
        while not self._place.clock.wait(self._stopped, LOOK_S):
            try:
                self._tend()
            except OSError as error:  # no memory or no PID for another process
                self._failed(f"it could not be started: {error.strerror or error}")
            except Exception as error:
                # if this thread ended silently, every later job would start a process, and dropped servers never end
                log.exception("the check of the fork server failed and is repeated")
                self._failed(repr(error))

    def _tend(self) -> None:
        """Drop a server that died or hangs; start one when it is time."""
        server = self._server
        if server is not None:
            if not server.ready and server.is_ready():
                server.ready = True
                log.info("the fork server is ready, process %s", server.process.pid)
            if (why := self._fault(server)) is not None:
                self._drop(server, why)
        while not self._dropped.empty():
            server, why = self._dropped.get()
            self._end(server)
            self._failed(why)
        if self._unkillable is not None and self._unkillable.poll() is None:
            return  # the next one would hang in the kernel beside it, and one more every ten minutes
        wanted = self._place.drain.asked is None and not self._busy()
        if self._server is None and wanted and self._place.clock.now() >= self._next:
            self._make()

    def _make(self) -> None:
        mark, common = secrets.token_hex(8), common_environment(self._place)  # the mark is as long as an attempt's
        # The placeholder comes last: a job's number overwrites it, and the zeros after the number end the block.
        environment = {**common, RUN_VARIABLE: mark, PLACEHOLDER: PLACEHOLDER_VALUE}
        command = [sys.executable, "-m", self._place.settings.trainer, FORK_SERVER, self._place.device.trains_on]
        with self._lock:
            self._marks.add(mark)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,
                    env=environment,
                )
        except OSError:
            ours.close()
            with self._lock:
                self._marks.discard(mark)
            raise
        server = ServerProcess(
            process=process, connection=ours, mark=mark, inherited=_inherited(common), born=self._place.clock.now()
        )
        try:
            threading.Thread(target=server.read, name="fork server's output", daemon=True).start()
        except RuntimeError:  # no thread for its output
            self._end(server)
            raise
        self._server = server

    def _drop(self, server: ServerProcess, why: str) -> None:
        """Use it no more; the node's own thread ends it."""
        with self._lock:
            if self._server is server:
                self._server = None
                self._dropped.put((server, why))

    def _end(self, server: ServerProcess) -> None:
        server.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        try:
            server.process.wait(timeout=KILL_S)
        except subprocess.TimeoutExpired:
            log.error("process %s, a fork server, was killed and does not end", server.process.pid)
            self._unkillable = server.process
        end_leftovers(server.mark)
        with self._lock:
            self._marks.discard(server.mark)

    def _failed(self, why: str) -> None:
        again_s = min(MOST_AGAIN_S, FIRST_AGAIN_S * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._next = self._place.clock.now() + again_s
        log.warning("the fork server is dropped: %s; another one is started in %.0f s", why, again_s)

    def _fault(self, server: ServerProcess) -> str | None:
        """Why a server can't be used any more; None: it can."""
        if (code := server.process.poll()) is not None:
            return f"it ended (exit status {code}){': ' if server.last else ''}{server.last[:300]}"
        if not server.ready and self._place.clock.now() - server.born > IMPORT_S:
            return f"it was not ready after {IMPORT_S:.0f} s"
        if server.inherited != _inherited(common_environment(self._place)):
            return "the environment of the node has changed"
        return None


def _inherited(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a process with this environment has from the one that starts it: its cores, limits and groups, too."""
    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {
        "environment": {name: value for name, value in environment.items() if name not in (JOB_VARIABLE, RUN_VARIABLE)},
        "cores": os.sched_getaffinity(0),
        "limits": [resource.getrlimit(getattr(resource, name)) for name in limits],
        "groups": Path("/proc/self/cgroup").read_text(),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
    }
