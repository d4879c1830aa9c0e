"""What a node and a trainer without a job agree on: how it is started, what it answers, where its marks are.

    python -m loractl.worker.recipe.trainer --spare cpu

A spare imports the training stack, says READY and waits. On Take it writes the attempt's mark and the job's number over
its own in the block of its environment that `/proc/PID/environ` shows, and says on both of its pipes that it is taken:
its output before that line belongs to no job. From then on it is a trainer like any other.

A host is a trainer that stays after its job with its loaded base. On Release it writes its own mark in place of the
attempt's, and says on both pipes that it is taken by that: from then on its output belongs to no job. The next job
takes it like a spare. A trainer that others join writes that mark on Share, and says on both pipes that it is shared:
from then on its output belongs to no job, since the jobs' own lines come as messages.
"""

from __future__ import annotations

SPARE = "--spare"
"""The argument before the kind of device."""

READY = "ready\n"
"""Its line on standard output once everything is imported."""

PLACEHOLDER = "LORACTL_WAITS"
"""The last variable of its environment. It is long enough to be overwritten by LORACTL_JOB with the longest number."""

PLACEHOLDER_VALUE = "-" * 24


def host_name(mark: str) -> str:
    """The value of LORACTL_JOB while a host has no job: its memory is ours, but no job's."""
    return f"host-{mark}"


def taken(mark: str) -> str:
    """The line, on standard output and standard error, after which it is this attempt's."""
    return f"taken {mark}\n"


def shared(mark: str) -> str:
    """The line, on standard output and standard error, after which it is several jobs'."""
    return f"shared {mark}\n"
