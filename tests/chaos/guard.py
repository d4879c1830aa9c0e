"""Ends what an aborted run leaves of its lab: a process of its own, which waits for the run's end, a SIGKILL too."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

REPO = Path(__file__).parents[2]


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """From here on nothing of the lab in this folder outlives this process."""
    command = [sys.executable, "-m", "tests.chaos.guard", str(folder)]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, start_new_session=True):
        yield  # its input ends with this block, or with this process


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes of the lab: its boxes have their homes there, and its services work there or name it."""
    mine = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            places = [process.environ().get("LORACTL_HOME", ""), process.cwd(), *process.cmdline()]
            named = any(f"{place}/".startswith(f"{folder}/") for place in places)
            if named and process.status() != psutil.STATUS_ZOMBIE and process.pid != psutil.Process().pid:
                mine.append(process)
    return mine


def _end(folder: Path) -> None:
    while found := processes_of(folder):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # first: else a worker would start its nodes again
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    for disk in folder.glob("*/"):
        subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    _end(Path(sys.argv[1]))
