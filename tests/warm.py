"""Processes that begin with their libraries loaded: each is forked by a server (warm_server.py) that has imported them.

    run(ARGUMENTS, ...)                         `loractl ARGUMENTS...` in a forked process, for a test
    python tests/warm.py ARGUMENTS...           is `loractl ARGUMENTS...`, with pipes that the caller made
    python -m tests.warm                        is loractl's trainer (LORACTL_TRAINER=tests.warm)
    FOLDER/python -m MODULE ...                 is sys.executable in a forked process: what that starts is forked, too
    python tests/warm.py --python KIND FOLDER -u -c   is `python -u -c`: a process of pytest-xdist

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

OWN, TRAINER = "tests.warm", "loractl.worker.recipe.trainer"
"""What LORACTL_TRAINER names, and what it is."""

SERVER = "tests.warm_server"
"""What imports and forks."""

PROGRAM = "-c"
"""In a module's place: the argument is a program."""

MODULES = {
    OWN: HEAVY,
    TRAINER: HEAVY,
    "tests.full_trainer": HEAVY,
    "loractl.worker.base.self_test": HEAVY,
    "loractl.worker.data.lengths": HEAVY,
    "loractl.worker.node": LIGHT,
    "loractl.worker.node.health.self_test": LIGHT,
    "loractl.worker.attempt.storage": LIGHT,
    "tests.quick_trainer": LIGHT,
}
"""What commands, nodes and trainers start by `python -m`, and the server that has it."""

COMMAND = ["-P", "-c", "from loractl.scheduler.cli.main import main; main()"]
"""What `join` starts for `doctor`."""

READ_AT_START = ("LD_", "LANG", "LC_", "PYTHONIOENCODING", "PYTHONUTF8")
READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "TORCH", "PYTORCH_")
"""A process whose variables of these names are not the server's starts cold: they are read once. The second are those
of the training stack."""

NO_MATTER = ("TORCHINDUCTOR_CACHE_DIR", "HF_XET_HIGH_PERFORMANCE", "HF_TOKEN")
"""What importing torch and lm_eval leaves in the environment of a test process, always the same; and what the hub's
client asks for anew each time."""

LEFT = "left"
"""The end of the name of a server's file that tells what was left behind."""

ALWAYS = "WARM_ALWAYS"
"""In the environment: a process that would start cold fails, and says why."""


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


def be_python(kind: str, folder: str, argv: list[str]) -> int:
    """Be `python -u -c PROGRAM` as soon as the server of this kind has loaded; where it cannot, begin cold."""
    import time

    deadline = time.monotonic() + 120
    while not os.path.exists(f"{folder}/{kind}") and time.monotonic() < deadline:  # noqa: PTH110
        time.sleep(0.05)
    asked = [*argv[2:], sys.executable]  # there it is another
    if argv[:2] != ["-u", PROGRAM] or (status := _follow(kind, PROGRAM, asked, folder)) is None:
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


def early(environment: dict[str, str] | os._Environ[str], names: tuple[str, ...]) -> dict[str, str]:
    """The variables that a process reads once, by the beginnings of their names."""
    return {name: value for name, value in environment.items() if name.startswith(names) and name not in NO_MATTER}


def _cold(module: str, argv: list[str]) -> NoReturn:
    """Go on as a person's machine would."""
    if ALWAYS in os.environ:
        sys.exit(f"not warm: {early(os.environ, READ_AT_START + READ_AT_IMPORT)}")
    if not module:
        command = os.path.join(os.path.dirname(sys.executable), "loractl")  # noqa: PTH118, PTH120
        os.execv(sys.executable, [sys.executable, command, *argv])
    os.execv(sys.executable, [sys.executable, "-m", TRAINER if module == OWN else module, *argv])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--python"]:
        sys.exit(be_python(*sys.argv[2:4], sys.argv[4:]))
    sys.exit(client("" if __spec__ is None else OWN, sys.argv[1:]))
