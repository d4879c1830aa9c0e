"""What holds a job that no card holds alone as it is: several cards, QLoRA, fewer rows at once, shorter rows.

The memory plan and the placement rule decide.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loractl.common.job.method import Method, Need, Parallel, SharedNeed, Ways, choose_method
from loractl.common.job.spec import JobSpec
from loractl.common.memory.fit import Fit, fewer_rows, largest_fit, plan_ways, shorter_rows
from loractl.common.memory.plan import plan
from loractl.common.memory.shape import Shape
from loractl.common.memory.step import Lengths
from loractl.common.placement.cards import Card
from loractl.common.placement.gangs import best_group, gang_of, may_share
from loractl.common.placement.lines import Waiting
from loractl.common.units import GIB
from loractl.scheduler.submit.need import open_methods

LONG_AGO = dt.datetime.fromtimestamp(0, dt.UTC)
"""Submit time of a job that is only planned: no decision depends on it."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A way for the existing cards to hold a job that none of them holds alone as it is."""

    settings: tuple[str, ...]  # KEY=VALUE, each for a --set; empty: as it is
    words: str  # the change, in a few words
    method: Method
    bytes: int  # of each card
    cards: int = 1
    parallel: Parallel = Parallel.NONE

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        words = {"method": self.method.value, "parallel": self.parallel.value}
        return {**vars(self), "settings": list(self.settings), **words}


@dataclass(frozen=True, kw_only=True)
class CardGroup:
    """Cards of a box that would hold a job together."""

    host: str
    way: SharedNeed
    method: Method
    size: int  # bytes of each card
    smallest: int  # bytes of the smallest of these cards
    now: bool  # they have room now

    @property
    def words(self) -> str:
        return f"{self.way.cards} cards of {self.host}"

    def solution(self, *settings: str) -> Solution:
        """As a solution, with the settings for it."""
        return Solution(
            settings=settings,
            words=f"{self.words} ({self.smallest / GIB:.0f} GiB), {self.way.parallel.value}",
            method=self.method,
            cards=self.way.cards,
            parallel=self.way.parallel,
            bytes=self.size,
        )


@dataclass(frozen=True, kw_only=True)
class PlannedForm:
    """A job, and what it needs from one card."""

    spec: JobSpec
    methods: Sequence[Method]
    planned: Need
    need: Need  # corrected by measured peaks
    lengths: Lengths | None

    def ways(self, spec: JobSpec) -> Ways:
        """On how many cards it may run in another form."""
        return plan_ways(spec, self.methods, self.planned, self.need, self.lengths)

    def boxes(self, ways: Ways, cards: Sequence[Card]) -> tuple[list[CardGroup], Method | None]:
        """The boxes whose cards would hold the job together, and the method that the best would take."""
        job = Waiting(
            job_id=0,
            user="",
            priority=0,
            since=LONG_AGO,
            methods=tuple(self.methods),
            need=self.need,
            requires=frozenset(self.spec.resources.node_labels.items()),
            alone=False,
            gangs=ways.gangs,
        )
        hosts = sorted({card.host for card in cards})
        found = [box for host in hosts if (box := _box(job, [c for c in cards if c.host == host])) is not None]
        best = min(found, key=lambda box: (box.way.cards, self.methods.index(box.method)), default=None)
        return found, None if best is None else best.method


def _box(job: Waiting, cards: Sequence[Card]) -> CardGroup | None:
    """How cards of one box would hold the job together, once other jobs have left them; None: they would not."""
    empty = [replace(card, running=()) for card in cards]
    if (way := gang_of(job, empty)) is None:
        return None
    for method in job.methods:
        size = way.need.of(method)
        holding = [card for card in empty if size is not None and may_share(card, job) and size <= card.capacity]
        if size is not None and (group := best_group(holding, way.cards)) is not None:
            now = [c for c in cards if may_share(c, job) and size <= c.room]
            smallest = min(card.total for card in group)
            return CardGroup(
                host=cards[0].host, way=way, method=method, size=size, smallest=smallest, now=len(now) >= way.cards
            )
    return None


def on_more_cards(
    asked: PlannedForm, boxes: Sequence[CardGroup], places: Sequence[Card], *settings: str
) -> list[Solution]:
    """The fewest cards of a box that hold the job, otherwise unchanged: as many as it may have, else as many as it
    could be given."""
    if boxes:
        return [min(boxes, key=lambda box: box.way.cards).solution(*settings)]
    resources = asked.spec.resources
    freed = () if resources.parallel == "auto" else ("resources.parallel=auto",)
    for count in asked.spec.training.even_cards[1:]:
        given = resources.model_copy(update={"cards": count, "parallel": "auto"})
        found, _ = asked.boxes(asked.ways(asked.spec.model_copy(update={"resources": given})), places)
        if found:
            return [found[0].solution(*settings, f"resources.cards={count}", *freed)]
    return []


def with_one_row(asked: PlannedForm, places: Sequence[Card], fewest: int) -> Iterator[Solution]:
    """Fewer than `fewest` cards of a box, each with one row at once."""
    for key, words, changed in fewer_rows(asked.spec, Fit(micro_batch=1, max_length=None)):
        smaller = replace(asked, spec=changed)
        for found in on_more_cards(
            smaller, smaller.boxes(smaller.ways(changed), places)[0], places, *key.split(" --set ")
        ):
            if found.cards < fewest:
                yield replace(found, words=f"{found.words}, {words}")


def in_another_form(asked: PlannedForm, shape: Shape, room: int, places: Sequence[Card]) -> Iterator[Solution]:
    """The job on one card of a given size: as it is, with QLoRA, with fewer rows at once, with shorter rows. Also QLoRA
    on several cards, if one is too small for it."""
    spec, lengths = asked.spec, asked.lengths
    alone = () if spec.resources.cards in (1, "auto") else ("resources.cards=auto",)

    def one(method: Method, size: int, words: str, *settings: str) -> Solution:
        return Solution(settings=(*alone, *settings), words=f"one card{words}", method=method, bytes=size)

    kept = choose_method(asked.methods, asked.need, room)
    if kept is not None:
        yield one(kept, asked.need.of(kept) or 0, "")
    if Method.QLORA not in asked.methods and Method.QLORA in open_methods(
        spec.model_copy(update={"method": Method.AUTO})
    ):
        size = plan(shape, spec, Method.QLORA, lengths).need_bytes
        if size <= room:
            yield one(Method.QLORA, size, "", "method=qlora")
        else:
            way = replace(asked, methods=(Method.QLORA,), need=replace(asked.need, qlora=size))
            yield from on_more_cards(way, way.boxes(way.ways(spec), places)[0], places, "method=qlora")
    for method in asked.methods if kept is None else ():
        fit = largest_fit(shape, spec, method, room, lengths)
        for key, words, changed in fewer_rows(spec, fit):
            size = plan(shape, changed, method, lengths).need_bytes
            yield one(method, size, f", {words}", *key.split(" --set "))
        for key, words, changed in shorter_rows(spec, fit):
            yield one(method, plan(shape, changed, method).need_bytes, f", {words}", key)
