"""What a node and a trainer without a job agree on: how it is started, what it answers, where its marks stand.

    python -m loractl.worker.recipe.trainer --spare cpu

A spare imports the training stack, says READY and waits. On Take it writes the attempt's mark and the job's number over
its own in the block of its environment that `/proc/PID/environ` shows, and says on both of its pipes that it is taken:
what it printed before that line is no job's. From then on it is a trainer like any other.

A host is a trainer that stays after its job with the base that it has loaded. On Release it writes a mark of its own in
place of the attempt's, and says on both pipes that it is taken by that: what it prints from there on is no job's. The
next job takes it as it would a spare. A trainer that others join writes that mark on Share, and says on both pipes that
it is shared: what it prints from there on is no job's, for the jobs' own lines come as messages.
"""

from __future__ import annotations

from collections.abc import Mapping

SPARE = "--spare"
"""The argument before the kind of device."""

READY = "ready\n"
"""Its line on standard output when all is imported."""

PLACEHOLDER = "LORACTL_WAITS"
"""The last variable of its environment. LORACTL_JOB with the longest number fits over it."""

PLACEHOLDER_VALUE = "-" * 24


def host_name(mark: str) -> str:
    """What stands in LORACTL_JOB while a host has no job: its memory is ours, and no job's."""
    return f"host-{mark}"


def by_mark(used: Mapping[str, int]) -> dict[str, int]:
    """Bytes by job, and of hosts by their marks, as rows name them."""
    return {name.removeprefix("host-"): size for name, size in used.items()}


def taken(mark: str) -> str:
    """The line, on standard output and standard error, from which on it is this attempt's."""
    return f"taken {mark}\n"


def shared(mark: str) -> str:
    """The line, on standard output and standard error, from which on it is several jobs'."""
    return f"shared {mark}\n"
