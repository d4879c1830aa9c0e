"""The tests' warm starts are warm: a whole run in which all of them fall back to cold ones takes twice as long."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import peft  # noqa: F401  what the stack leaves in this process's environment must not make the commands' another
import psutil
import pytest

from .. import warm
from ..conftest import Cli
from ..waiting import is_alive


@pytest.fixture
def always(make_cli: Callable[..., Cli]) -> Cli:
    """What would start cold with it fails."""
    return make_cli(**{warm.ALWAYS: "1"})


@pytest.mark.parametrize("words", [["--version"], ["data", "--help"]], ids=lambda words: words[0])
def test_a_command_of_a_process_that_has_the_stack_is_forked(always: Cli, words: list[str]) -> None:
    assert "loractl" in always(*words).stdout


def test_a_worker_that_a_test_waits_for_has_a_node_that_is_forked_and_told_to_stop(always: Cli) -> None:
    said = always("worker", "--drain-when-idle")
    assert "Serving CPU, " in said.stderr and "not warm" not in said.stderr and "started again" not in said.stderr


def test_a_command_of_the_stack_with_another_setting_of_it_starts_cold(always: Cli) -> None:
    other = always.with_environment(HF_HOME="/nowhere")
    assert "loractl" in other("--version").stdout, "it reads none of them"
    with pytest.raises(AssertionError, match="not warm"):
        other("data", "--help")
    del other.environment[warm.ALWAYS]
    assert "loractl" in other("data", "--help").stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_a_signal_reaches_who_is_forked(cli: Cli, number: int, status: int) -> None:
    cli("status")
    process = cli.start("web", "--port", 0, warm_start=True)
    assert process.stdout is not None and re.match(r"The lab's page: ", process.stdout.readline())
    (forked,) = [one for one in psutil.process_iter() if one.pid != process.pid and _holds(one, process)]
    process.send_signal(number)
    assert process.wait(timeout=20) == status
    deadline = time.monotonic() + 20
    while is_alive(forked):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.02)


def _holds(other: psutil.Process, process: subprocess.Popen[str]) -> bool:
    """Whether it has the process's output open."""
    try:
        return Path(f"/proc/{other.pid}/fd/1").readlink() == Path(f"/proc/{process.pid}/fd/1").readlink()
    except OSError:
        return False
