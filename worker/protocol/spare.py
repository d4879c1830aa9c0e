"""What a node and its spare trainer agree on: how it is started, what it answers, and where its marks stand.

    python -m loractl.worker.training.trainer --spare cpu

A spare imports the training stack, says READY and waits. On Take it writes the attempt's mark and the job's number over
its own in the block of its environment that `/proc/PID/environ` shows, and says on both of its pipes that it is taken:
what it printed before that line is no job's. From then on it is a trainer like any other.
"""

from __future__ import annotations

SPARE = "--spare"
"""The argument before the kind of device."""

READY = "ready\n"
"""Its line on standard output when all is imported."""

PLACEHOLDER = "LORACTL_WAITS"
"""The last variable of its environment. LORACTL_JOB with the longest number fits over it."""

PLACEHOLDER_VALUE = "-" * 24


def taken(mark: str) -> str:
    """The line, on standard output and standard error, from which on it is this attempt's."""
    return f"taken {mark}\n"
