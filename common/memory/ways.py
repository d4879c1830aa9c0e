"""The ways in which several cards may share a job: how many of them, how it is divided, and the bytes of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loractl.common.job.method import Method, Parallel
from loractl.common.job.need import Need, SharedNeed, Ways, least_need
from loractl.common.units import GIB

from .config import read_shape
from .plan import plan
from .step import Lengths, Stack

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec

    from .shape import Shape

NEVER_DIVIDED = 8 * GIB
"""A job that needs less of one card is not divided unless it asks for that: nearly every card holds it."""

NO_CARD_HAS = 2**50
"""Bytes: the need of a method that the job's own max_vram rules out on these cards."""


def plan_ways(
    spec: JobSpec, methods: Sequence[Method], planned: Need, need: Need, lengths: Lengths | None = None
) -> Ways:
    """On how many cards the job may run. `planned`, `need`: of one card, the latter corrected by measured peaks, which
    corrects the others in proportion."""
    cards, wanted = spec.resources.cards, spec.resources.parallel
    if cards == 1 or spec.kind.undivided(spec) is not None:
        return Ways()
    shape = read_shape(spec.base_model, spec.revision)
    if cards == "auto":
        if shape is None or (least_need(methods, need) or 0) <= NEVER_DIVIDED:
            return Ways()
        counts = [count for count in spec.training.even_cards if count > 1]
    else:
        counts = [cards]
    hows = [Parallel(wanted)] if wanted != "auto" else [Parallel.DATA, Parallel.SHARDED]
    if cards == "auto":
        hows = [Parallel.SHARDED]
    ways = [
        SharedNeed(cards=n, parallel=how, need=_each(shape, spec, n, how, planned, need, lengths))
        for n in counts
        for how in hows
    ]
    return Ways(alone=cards == "auto", gangs=tuple(way for way in ways if _is_open(way, methods)))


def _each(
    shape: Shape | None,
    spec: JobSpec,
    cards: int,
    parallel: Parallel,
    planned: Need,
    need: Need,
    lengths: Lengths | None,
) -> Need:
    """What each of `cards` cards needs, by method."""
    if shape is None:
        return Need(lora=None, qlora=None)
    stack, most = Stack(cards=cards, parallel=parallel), spec.resources.max_vram or NO_CARD_HAS

    def size(method: Method) -> int:
        before, now = planned.of(method), need.of(method)
        learned = now / before if before and now else 1.0
        each = int(plan(shape, spec, method, lengths, stack=stack).need_bytes * learned)
        return each if each <= most else NO_CARD_HAS

    return Need(lora=size(Method.LORA), qlora=size(Method.QLORA))


def _is_open(way: SharedNeed, methods: Sequence[Method]) -> bool:
    least = least_need(methods, way.need)
    return least is None or least < NO_CARD_HAS
