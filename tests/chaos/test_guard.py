"""An aborted run leaves no process and no file of its lab."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .guard import REPO, processes_of

RUN = """
import os, subprocess, sys, time
from pathlib import Path
from tests.chaos.guard import guarded

folder = Path(sys.argv[1])
with guarded(folder):
    idle = "import time; time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", idle], env={"LORACTL_HOME": f"{folder}/box-a"}, start_new_session=True)
    subprocess.Popen([sys.executable, "-c", idle], cwd=folder, start_new_session=True)
    subprocess.Popen([sys.executable, "-c", idle, f"{folder}/store"], start_new_session=True)
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_run_has_started_ends_with_it_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    command = [sys.executable, "-c", RUN, str(folder)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}) as run:
        assert run.stdout is not None and run.stdout.readline() == b"up\n"
        assert len(processes_of(folder)) == 5, "three, the run and its guard"
        run.send_signal(how)
    deadline = time.monotonic() + 20
    while folder.exists() or processes_of(folder):
        assert time.monotonic() < deadline, processes_of(folder)
        time.sleep(0.05)
