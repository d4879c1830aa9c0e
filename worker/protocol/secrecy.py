"""Hides the environment of worker, nodes and their store calls, which contains passwords, from their user's other
processes."""

from __future__ import annotations

import ctypes
import logging
import os

log = logging.getLogger("loractl.worker")

_PR_SET_DUMPABLE = 4  # linux/prctl.h


def hide_environment() -> None:
    """Make /proc/PID/environ and the memory of this process readable only by root.

    The trainers run as the same user, and so does the code of base models and metrics in them. A process's children are
    not hidden by that: each does it first. It also disables core dumps.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("other processes of this user can read this one's environment: %s", os.strerror(ctypes.get_errno()))
