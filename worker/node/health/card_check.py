"""The cards of this box, each tested as before it serves, for loractl doctor.

    python -m loractl.worker.node.health.card_check

prints a JSON object: `cards`, each with number, name, fault (or null), seconds and torch (of its self-test, or null),
and served, where a worker of another home has the card: a test could take memory from its jobs.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loractl.common.errors import LoractlError
from loractl.common.settings import Settings, load_settings
from loractl.worker.attempt.order import device_environment
from loractl.worker.device.devices import Device, find_devices
from loractl.worker.node.lock import is_served

from .self_test import NAME, SELF_TEST, self_test

AT_ONCE = 16
"""Cards that are tested beside each other: more than a box has."""


def main() -> None:
    """Print what the cards of this box could do."""
    print(json.dumps({"cards": check_cards(load_settings())}), flush=True)  # noqa: T201  it is the answer


def check_cards(settings: Settings, module: str = SELF_TEST) -> list[dict[str, Any]]:
    """Test every card by `module`. That none is found is a card without a name and with a fault."""
    try:
        devices = find_devices(settings)
    except LoractlError as error:
        return [{"number": "", "name": "", "fault": error.sentence, "hint": error.hint, "seconds": None, "torch": None}]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda device: _check(device, module), devices))


def _check(device: Device, module: str) -> dict[str, Any]:
    """A processor and a simulated card need no test, as for a node."""
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
