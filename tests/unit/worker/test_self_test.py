"""A card's self-test as its node sees it: real processes that pass, fail, crash or hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loractl.worker.clock import NodeClock
from loractl.worker.device.occupancy import Watch
from loractl.worker.device.snapshot import Snapshot
from loractl.worker.node.health import self_test as module
from loractl.worker.node.health.self_test import SelfTest, self_test

WELL = """
print("Welcome to some library")
print('{"fault": null, "sees_us": true, "context": 536870912}')
print("bye")
"""

BITSANDBYTES = """
import os, sys
print("Error invalid device ordinal at line 522 in file /src/csrc/pythonInterface.cpp", file=sys.stderr, flush=True)
os._exit(1)
"""


def tried(folder: Path, program: str, longest_s: float = 60) -> str | None:
    script = folder / "card.py"
    script.write_text(program)
    return self_test([sys.executable, str(script)], dict(os.environ), longest_s).fault


def test_a_report_is_found_between_what_libraries_print(tmp_path: Path) -> None:
    (tmp_path / "card.py").write_text(WELL)
    report = self_test([sys.executable, str(tmp_path / "card.py")], dict(os.environ))
    assert (report.fault, report.sees_us, report.context) == (None, True, 2**29)


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        (BITSANDBYTES, "its self-test ended with exit status 1: Error invalid device ordinal at line 522 in file"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "its self-test ended with signal SIGSEGV: nothing"),
        ("raise SystemExit(0)", "its self-test ended with exit status 0: nothing was said"),
        ('print(\'{"fault": "it is lost"}\')', "it is lost"),
    ],
    ids=["bitsandbytes", "a crash", "no report", "a fault"],
)
def test_whatever_ends_a_self_test_is_the_card_s_fault(tmp_path: Path, program: str, fault: str) -> None:
    said = tried(tmp_path, program)
    assert said is not None and said.startswith(fault)


def test_a_test_that_hangs_is_left_and_closes_the_card(tmp_path: Path) -> None:
    said = tried(tmp_path, "import time; time.sleep(60)", longest_s=1)
    assert said == "its self-test did not end within 1 s: the driver hangs; look at dmesg, reboot the box"


class Hangs:
    """A self-test that waits in the kernel: SIGKILL does not end it."""

    pid, returncode = 0, None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.ended = False

    def communicate(self, timeout: float) -> tuple[str, str]:
        raise subprocess.TimeoutExpired("self-test", timeout)

    def kill(self) -> None:
        pass

    def poll(self) -> int | None:
        return -9 if self.ended else None


class Rounds(NodeClock):
    """Runs a thread's work at once, and calls `each` with the number of each of its waits."""

    def __init__(self, each: Callable[[int, threading.Event], None]) -> None:
        self._each, self._number = each, 0

    def start(self, work: Callable[[], object], name: str, *, daemon: bool = True) -> threading.Thread:
        work()
        return threading.current_thread()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self._number += 1
        self._each(self._number, event)
        return event.is_set()


def test_while_a_hanging_test_can_t_be_killed_no_other_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more each minute would hang beside it, each with the memory of torch."""
    card: Any = SimpleNamespace(trains_on="cuda", uuid="GPU-1", look=lambda: Snapshot(free=0), environment=dict)
    tests, faults, watch = list[Hangs](), list[str | None](), Watch(device=card, node_pid=os.getpid())

    def start(*_: Any, **__: Any) -> Hangs:
        tests.append(Hangs())
        return tests[-1]

    def look(number: int, stopped: threading.Event) -> None:
        faults.append(watch.fault)
        if number == 4:
            assert len(tests) == 1
            tests[0].ended = True  # the driver has come back
        if number == 5:
            assert len(tests) == 2, "the card would stay closed"
            stopped.set()

    monkeypatch.setattr(module.subprocess, "Popen", start)
    place: Any = SimpleNamespace(device=card, clock=Rounds(look), node="heron:0", threads=1)
    SelfTest(place, watch, lambda: None).start()
    assert len(set(faults)) == 1 and "the driver hangs" in str(faults[0])
