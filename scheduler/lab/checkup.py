"""What doctor finds as the user who uses the lab: this user, or the user of the worker's service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from loractl.common.errors import LoractlError, UsageError

from .health.condition import Condition, Diagnosis, Level
from .place import SERVICE, SERVICE_USER, Place


def service_diagnosis(checks: tuple[str, ...] = ()) -> Diagnosis:
    """The findings for this box's worker, with its settings and as its user. Raises UsageError without one,
    LoractlError."""
    if os.geteuid() != 0:
        raise UsageError(
            "--service needs root", "only root reads the service's settings: sudo loractl doctor --service"
        )
    return diagnosed(SERVICE, SERVICE.variables(), checks)


def diagnosed(place: Place, variables: dict[str, str], checks: tuple[str, ...] = ()) -> Diagnosis:
    """What doctor finds with these variables. Raises LoractlError if the user can't even start loractl."""
    command = [sys.executable, "-P", "-c", "from loractl.scheduler.cli.main import main; main()", "doctor", "--json"]
    command += [word for check in checks for word in ("--check", check)]
    service_s: dict[str, Any] = {"user": SERVICE_USER, "group": SERVICE_USER, "extra_groups": []}
    try:
        done = subprocess.run(
            command, env=place.environment(variables), capture_output=True, text=True, cwd="/",
            stdin=subprocess.DEVNULL, **(service_s if place.service else {}),
        )  # fmt: skip
        answer = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        who = f"the user {SERVICE_USER}" if place.service else "this user"
        raise LoractlError(
            f"{who} can't run {sys.executable}", "install loractl where it can read, as in /opt/loractl"
        ) from error
    found = [Condition(**{**line, "level": Level(line["level"])}) for line in answer["checks"]]
    return Diagnosis(conditions=tuple(found))
