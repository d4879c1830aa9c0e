"""What the jobs of a trace would take without recomputing, and how long: a trace says neither."""

from __future__ import annotations

from loractl.common.job.need import RoomyForm
from loractl.common.placement.clock import ReplayedForm

FORMS = ((4, 4.5, 0.71), (2, 2.6, 0.74), (1, 1.7, 0.79))
"""Rows at once, bytes as a multiple of the need, and the share of the time: of 8B in NF4, 4 rows of 1,024 tokens, rank
16. The bytes are the memory plan's, the times counted for a 4090 (docs/budget.md): none was measured on a card."""


def forms_of(need: int) -> tuple[ReplayedForm, ...]:
    """The forms of a job that needs so many bytes, each as if it were such a job."""
    return tuple(
        ReplayedForm(form=RoomyForm(micro_batch=rows, bytes=int(times * need), planned=int(times * need)), time=share)
        for rows, times, share in FORMS
    )
