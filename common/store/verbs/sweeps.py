"""Sweeps: a row and its members, which are ordinary jobs."""

from __future__ import annotations

from ..queries import submissions, sweeps, wishes
from .verb import Subject, lists, reads, writes


class SweepVerbs(Subject):
    """Verbs about sweeps."""

    submit = writes(submissions.submit_sweep)
    cancel = writes(wishes.cancel_sweep)

    get = reads(sweeps.read_sweep)
    head = reads(sweeps.read_head)
    several = reads(sweeps.read_several)
    newest = lists(sweeps.newest_sweeps)
