"""What would let a job start now: another method, a smaller form, or no other programs on a card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loractl.common.job.method import Method, Need
from loractl.common.placement.cards import Card, Occupant, could_start
from loractl.common.placement.lines import Waiting
from loractl.common.store.fleet import FleetView, waiting_of
from loractl.common.store.tables import Job
from loractl.common.units import gib

from .cards import largest_program


def sooner(job: Job, view: FleetView) -> tuple[str, str] | None:
    """What would happen, and the command for it; None: nothing that is known here helps. It plans the job in smaller
    forms."""
    me, left = waiting_of(vars(job), view.now), _left(view)
    for changed, size, words, command in (*_with_qlora(job, me), *_smaller(job, me, left)):
        node = next((card.node for card in left if could_start(changed, card, left)), None)
        if node is not None:
            return f"It would start now on {node} with {words} (plan {gib(size)} GiB)", command
    held = without_others(job, view)
    return None if held is None else (f"It would fit now on {held[0]} without {held[1]}", "")


def _left(view: FleetView) -> list[Card]:
    """The cards with what the rule does now: no room is left on one that is kept."""
    cards = {node: card for node, card in view.cards.items() if node not in view.kept}
    for placed in view.placed.values():
        for share in placed.shares:
            if share.node in cards:
                one = Occupant(job_id=placed.job.job_id, user=placed.job.user, reserved=share.bytes)
                cards[share.node] = cards[share.node].with_job(one)
    return list(cards.values())


Form = tuple[Waiting, int, str, str]
"""A waiting job in another form, its bytes, the form in words, and the command for it."""


def _with_qlora(job: Job, me: Waiting) -> Iterator[Form]:
    if Method.QLORA not in me.methods and job.vram_qlora is not None:
        changed, form = replace(me, methods=(Method.QLORA,)), "method: qlora"
        form += ", from step 0" if job.checkpoint is not None else ""
        yield changed, job.vram_qlora, form, f"{change_of(job)} --set method=qlora"


def change_of(job: Job) -> str:
    """The command by which a job gets settings of another training: one that has begun keeps its own, and so do members
    of a sweep (`change/amendment.py`)."""
    is_bound = job.attempt > 0 or job.sweep_id is not None
    return f"loractl submit --like {job.job_id}" if is_bound else f"loractl edit {job.job_id}"


def _smaller(job: Job, me: Waiting, cards: Sequence[Card]) -> Iterator[Form]:
    """Forms that the largest room would hold; none of a spec that only a newer version can read."""
    from pydantic import ValidationError

    from loractl.common.job.spec import JobSpec
    from loractl.common.memory.config import read_shape
    from loractl.common.memory.fit import fewer_rows, largest_fit, shorter_rows
    from loractl.common.memory.plan import plan

    try:
        spec = JobSpec.model_validate(job.spec)
    except ValidationError:
        return
    shape, room = read_shape(spec.base_model, spec.revision), max((card.room for card in cards), default=0)
    if shape is None or room <= 0:
        return
    for method in me.methods:
        fit = largest_fit(shape, spec, method, room)
        for key, words, form in (*shorter_rows(spec, fit), *fewer_rows(spec, fit)):
            size = plan(shape, form, method).need_bytes
            need = Need(lora=size, qlora=None) if method is Method.LORA else Need(lora=None, qlora=size)
            as_ = f"{words}, as {method.value}" if len(me.methods) > 1 else words
            yield replace(me, need=need, methods=(method,)), size, as_, f"loractl plan {job.job_id} --set {key}"


def without_others(job: Job, view: FleetView) -> tuple[str, str] | None:
    """(card, program) where the job would fit now if other people's programs were not there."""
    me, cards = waiting_of(vars(job), view.now), view.cards.values()
    for card in cards:
        if card.outside == 0 or could_start(me, card, cards):
            continue
        if could_start(me, replace(card, outside=0), cards) and view.nodes[card.node].outside:
            return card.node, largest_program(view, card)
    return None
