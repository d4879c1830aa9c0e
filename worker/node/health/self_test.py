"""A card's self-test: in a process of its own before the card serves, and again while it fails.

    python -m loractl.worker.node.health.self_test

tests the cards of this box in the same way for loractl doctor. It prints a JSON object: `cards`, each with number,
name, fault (or null), seconds and torch (of its self-test, or null), and with served if a worker serves the card. Such
a card is not tested, since a test could take memory from its jobs.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loractl.common.errors import LoractlError
from loractl.common.settings import Settings, load_settings
from loractl.worker.attempt.order import bare_environment, device_environment
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.devices import Device, find_devices
from loractl.worker.device.occupancy import Watch
from loractl.worker.protocol.messages import SelfTestReport, read_report

from ..lock import is_served

log = logging.getLogger("loractl.worker")

SELF_TEST = "loractl.worker.base.self_test"

AGAIN_S = 60.0
"""Seconds between two looks at a card's faults; a card that failed is tested again then."""

NOT_TESTED = "its self-test has not ended yet"
"""Why a card takes no job before its first self-test has ended."""

LONGEST_S = 180.0
"""A test that takes longer than this hangs in the driver: importing torch from a slow disk takes only a minute."""

NAME = "self-test"
"""The test's name in place of a job's number. By it the memory counts as ours, not as another program's that may come
back."""


class SelfTest:
    """Keeps a CUDA card closed until its self-test has passed, at the start and after every fault.

    Calls `changed` when the card has opened or closed.
    """

    def __init__(self, place: Workplace, watch: Watch, changed: Callable[[], None], module: str = SELF_TEST) -> None:
        self._place = place
        self._watch = watch
        self._changed = changed
        self._command = [sys.executable, "-m", module, place.device.trains_on, place.device.uuid]
        self._stopped = threading.Event()
        self._process: subprocess.Popen[str] | None = None  # of the last test
        if place.device.trains_on == "cuda":
            watch.fault = NOT_TESTED

    def start(self) -> None:
        """Start the tests in a thread; a processor and a simulated card need none."""
        if self._watch.fault is not None:
            self._place.clock.start(self._run, "self-test")

    def stop(self) -> None:
        """Let the thread end; a running test ends by itself."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            before = self._watch.fault
            if self._watch.fault_of_device() is not None:
                self._watch.fault = before or "its self-test is due, since it had a fault"
            elif before is not None:
                self._test()
                if self._watch.fault != before:
                    self._changed()
            self._place.clock.wait(self._stopped, AGAIN_S)

    def _test(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return  # not even SIGKILL ends it: another one would hang beside it, and one more each minute
        self._process = _start(self._command, bare_environment(self._place, NAME))
        report = _report_of(self._process, LONGEST_S)
        if report.fault is not None and report.fault != self._watch.fault:
            log.error("%s is closed: %s", self._place.node, report.fault)
        self._watch.self_test = report.model_dump()
        self._watch.sees_us = report.sees_us
        self._watch.fault = report.fault


def self_test(command: Sequence[str], environment: dict[str, str], longest_s: float = LONGEST_S) -> SelfTestReport:
    """Run a self-test and read its report. A process that prints no report is a fault too."""
    return _report_of(_start(command, environment), longest_s)


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )


def _report_of(process: subprocess.Popen[str], longest_s: float) -> SelfTestReport:
    try:
        output, errors = process.communicate(timeout=longest_s)
    except subprocess.TimeoutExpired:
        process.kill()  # don't wait: a process that hangs in the driver can't be killed
        hung = f"its self-test did not end within {longest_s:.0f} s: the driver hangs; look at dmesg, reboot the box"
        return SelfTestReport(fault=hung)
    if (report := read_report(output)) is not None:
        return report
    code = process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    # if a kernel fails, bitsandbytes calls exit(1) and prints why in the last line
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "nothing was said")
    return SelfTestReport(fault=f"its self-test ended with {how}: {last[:300]}")


AT_ONCE = 16
"""Cards that are tested at the same time: more than a box has."""


def main() -> None:
    """Print what the cards of this box could do."""
    print(json.dumps({"cards": check_cards(load_settings())}), flush=True)  # noqa: T201  it is the answer


def check_cards(settings: Settings, module: str = SELF_TEST) -> list[dict[str, Any]]:
    """Test every card by `module`. If no card is found, returns one without a name whose fault says so."""
    try:
        devices = find_devices(settings)
    except LoractlError as error:
        return [{"number": "", "name": "", "fault": error.sentence, "hint": error.hint, "seconds": None, "torch": None}]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda device: _check(device, module), devices))


def _check(device: Device, module: str) -> dict[str, Any]:
    """Test one card. As for a node, a processor and a simulated card need no test."""
    found = {"number": device.number, "name": device.name, "seconds": None, "torch": None}
    fault = device.look().fault
    if fault is None and device.kind != "cpu" and is_served(device.uuid):
        return {**found, "fault": None, "served": True}
    if fault is not None or device.trains_on != "cuda":
        return {**found, "fault": fault}
    command = [sys.executable, "-m", module, device.trains_on, device.uuid]
    report = self_test(command, device_environment(device, NAME, threads=1))
    return {**found, "fault": report.fault, "seconds": report.seconds, "torch": report.torch}


if __name__ == "__main__":
    main()
