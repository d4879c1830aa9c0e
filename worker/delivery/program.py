"""Sends a message to a command of the box's owner: as JSON on its stdin, never in its arguments, and without a
shell."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess

from loractl.common.channels import Channel
from loractl.common.store.records import Delivery, Parcel

from .deadline import DEADLINE_S
from .message_forms import facts

_ENVIRONMENT = ("PATH", "HOME", "LANG", "TZ")
"""What it gets from the node's environment, which contains passwords."""


def run_program(channel: Channel, parcel: Parcel, deadline_s: float = DEADLINE_S) -> Delivery:
    """Run it once; exit status 0 means that the message is delivered. At the deadline it is killed with its
    children."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    nothing = subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            channel.command,
            stdin=subprocess.PIPE,
            stdout=nothing,
            stderr=nothing,
            env=environment,
            start_new_session=True,
        )
    except OSError:
        return Delivery(again=True, why="the command can't be started")
    try:
        process.communicate(json.dumps(facts(parcel)).encode(), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return Delivery(again=True, why=f"the command did not end within {deadline_s:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    status = process.returncode
    return Delivery(
        sent=status == 0, again=status != 0, why=f"the command ended with status {status}" if status else ""
    )
