"""Room that nobody else wants: in it a job that is alone on its card recomputes nothing, or every second block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from loractl.common.job.method import RoomyForm

from .cards import Card
from .lines import Queue
from .rule import Placement

Wanted = Callable[[int], bool]
"""Whether a ready job would fit into this many bytes next to the job."""


def with_room(placed: Placement, card: Card, forms: Sequence[RoomyForm], wanted: Wanted) -> Placement:
    """The placement in the fastest form for which its card has room; unchanged if others are on the card, or if a job
    that is ready now wants what the form would take.

    The rule gives the job a card by its need alone, so no line changes. `wanted` is asked at most once. With every
    second block recomputed it trains only on a card of one job: an eighth of the time is less than the loss of a job
    that comes later and would have fitted next to the need.
    """
    if placed.beside or card.processor or card.running:
        return placed
    held = [form for form in forms if placed.reserved < form.bytes <= placed.room]
    form = next((form for form in held if not (form.half and card.slots > 1)), None)
    if form is None or wanted(card.free - placed.reserved if card.slots > 1 else 0):
        return placed
    return replace(placed, reserved=form.bytes, form=form)


def is_wanted(queue: Queue, free: int, job_id: int) -> bool:
    """Whether another ready job than this one needs no more than `free` bytes."""
    others = (queue.after(job) if job.job_id == job_id else job for job in queue.firsts(room=free))
    return any(job is not None and job.bound is not None and job.bound <= free for job in others)
