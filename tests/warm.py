"""Processes that begin with the training stack loaded: each is forked from one that has imported it.

Importing torch, transformers and peft takes 7 seconds of a processor, and a fork 20 ms. So the tests' commands and
trainers start through this file, which does one of three things:

    python -m tests.warm --serve SOCKET    imports everything, then forks a process for each connection
    python tests/warm.py ARGUMENTS...      is `loractl ARGUMENTS...`
    python -m tests.warm                   is loractl's trainer (LORACTL_TRAINER=tests.warm)

The last two hand their pipes, environment and working directory to the server, whose child does the work with loractl's
own `main`. They end as the child ends, by the same status or signal; when they die, the child is killed. What differs
from a cold start: the child's own /proc/PID/environ and cmdline are the server's, it is in another session, and all
children of a server have one hash seed. Tests that are about these start cold: the marker `cold`.
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys

SOCKET = "WARM_SOCKET"
"""In the environment: where the server listens. Without it everything starts cold."""

LATE = (
    "alembic.command", "alembic.context", "bitsandbytes", "celery.app.amqp", "datasets", "jinja2",
    "kombu.transport.redis", "psycopg", "rouge_score.rouge_scorer", "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite", "transformers.generation", "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""What loractl imports when it needs it, and nearly every run does."""

READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "TORCH", "PYTORCH_", "LD_", "LANG", "LC_")
"""A process whose variables of these names are not the server's starts cold: libraries read them once."""

WRITTEN_AT_IMPORT = ("TORCHINDUCTOR_CACHE_DIR", "HF_XET_HIGH_PERFORMANCE")
"""What importing torch and lm_eval leaves in the environment of a test process, always the same."""

ALWAYS = "WARM_ALWAYS"
"""In the environment: a process that would start cold fails, and says why."""


def client(argv: list[str]) -> int:
    """Be `loractl argv...`, or the trainer without arguments. Returns the exit status."""
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.environ[SOCKET])
    except (KeyError, OSError):
        _cold(argv)
    request = marshal.dumps((argv, os.getcwd(), dict(os.environ)))  # noqa: PTH109  pathlib is slow to import
    socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(request)
    answer = connection.recv(4)
    if not answer:
        return 70  # the server has gone
    status = int.from_bytes(answer, "big", signed=True)
    if status == _OTHER_ENVIRONMENT:
        _cold(argv)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


_OTHER_ENVIRONMENT = 1000


def _cold(argv: list[str]) -> None:
    if ALWAYS in os.environ:
        sys.exit(f"not warm: {_early(os.environ)}")
    from pathlib import Path

    if argv:
        os.execv(sys.executable, [sys.executable, str(Path(sys.executable).with_name("loractl")), *argv])
    from loractl.common.settings import TRAINER

    os.execv(sys.executable, [sys.executable, "-m", TRAINER])


def serve(path: str) -> None:
    """Fork a process for each connection until standard input closes."""
    import contextlib
    import gc
    import selectors

    own = _early(os.environ)  # before the libraries add to it
    _load()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # by the connection's number
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                pid = _begin(connection, own)
                if not pid:
                    connection.close()
                    continue
                children[connection.fileno()] = pid, connection
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, connection.fileno())
                waiting.register(connection, selectors.EVENT_READ)
            elif key.data is None:  # whoever asked has ended
                pid, connection = children.get(key.fd, (0, None))
                if connection is key.fileobj:
                    waiting.unregister(connection)
                    os.kill(pid, signal.SIGKILL)
            else:
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                pid, connection = children.pop(key.data)
                with contextlib.suppress(KeyError):
                    waiting.unregister(connection)
                with contextlib.suppress(OSError):
                    _answer(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                connection.close()


def _begin(connection: socket.socket, own: dict[str, str]) -> int:
    """The pid of a child that does what is asked for; 0 when it can't be done here."""
    head, pipes, _, _ = socket.recv_fds(connection, 4, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size and (part := connection.recv(size - len(request))):
        request += part
    try:
        if len(request) < size or size == 0:
            return 0
        argv, folder, environment = marshal.loads(request)
        if _early(environment) != own:
            _answer(connection, _OTHER_ENVIRONMENT)
            return 0
        pid = os.fork()
        if pid == 0:
            _child(pipes, argv, folder, environment)
        return pid
    finally:
        for pipe in pipes:
            os.close(pipe)


def _early(environment: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in WRITTEN_AT_IMPORT
    }


def _answer(connection: socket.socket, status: int) -> None:
    connection.sendall(status.to_bytes(4, "big", signed=True))


def _child(pipes: list[int], argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Become the process that was asked for; never returns."""
    import io

    status = 1
    try:
        os.setsid()
        for number, pipe in enumerate(pipes):
            os.dup2(pipe, number)
            os.close(pipe)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  the server's own were made for other files
        unbuffered = "PYTHONUNBUFFERED" in environment
        out = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(out if unbuffered else io.BufferedWriter(out), write_through=unbuffered)
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
        status = _run(argv, environment)
    finally:
        os._exit(status)


def _run(argv: list[str], environment: dict[str, str]) -> int:
    import atexit
    import importlib
    import threading
    import traceback

    import numpy
    import torch

    numpy.random.seed()
    threads = environment.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else os.cpu_count() or 1)
    sys.argv = ["loractl", *argv]
    sys.modules["__main__"].__package__ = None  # click takes the program's name from it
    try:
        if argv:
            from loractl.scheduler.cli import main as command

            command()
        from loractl.common.settings import TRAINER

        return int(importlib.import_module(TRAINER).main())
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return int(end.code or 0)
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:  # noqa: BLE001  as an interpreter ends
        traceback.print_exc()
        return 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does before it runs atexit's
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue


def _load() -> None:
    """Import the training stack, and all of loractl that starts nothing by being imported."""
    import importlib
    import pkgutil

    import loractl

    for name in LATE:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(loractl.__path__, "loractl."):
        if not module.name.endswith(".__main__") and ".migrations." not in module.name:
            importlib.import_module(module.name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(client(sys.argv[1:]))
