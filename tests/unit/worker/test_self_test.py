"""A card's self-test as its node sees it: real processes that pass, fail, crash or hang."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from loractl.worker.node.health.self_test import self_test

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
