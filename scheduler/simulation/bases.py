"""Base models for the jobs of a trace that does not name any."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from loractl.common.errors import UsageError

from .workload import TraceJob

EACH = "each"
"""The number of base models that gives each job its own."""

_SEED = 0


def parse_count(text: str) -> int | None:
    """The number of base models; None: each job has its own. Raises UsageError."""
    if text == EACH:
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(f"--base-models {text} is not a number of base models", f"like --base-models 6, or {EACH}")


def with_bases(jobs: Sequence[TraceJob], count: int | None, size: int) -> tuple[TraceJob, ...]:
    """The jobs, each on one of `count` base models of `size` bytes, drawn evenly, and the same in every run.

    A job that needs no more than a base has its own, half the size of its need. Raises UsageError if the trace names
    base models itself.
    """
    if any(job.base_model or job.base_size for job in jobs):
        raise UsageError("--base-models: the trace names its base models itself", "leave --base-models out")
    rng = random.Random(_SEED)  # noqa: S311  no secret hangs on it
    drawn = []
    for number, job in enumerate(jobs, start=1):
        base = number if count is None else rng.randrange(count) + 1
        own = replace(job, base_size=job.need // 2)
        drawn.append(replace(job, base_model=f"base {base}", base_size=size) if job.need > size else own)
    return tuple(drawn)
