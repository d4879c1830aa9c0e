"""The placement rule against a plain reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given

from loractl.common.job.method import Method
from loractl.common.placement.cards import (
    Card,
    Occupant,
)
from loractl.common.placement.lines import Waiting
from loractl.common.placement.rule import RESERVE_AFTER_S
from loractl.common.placement.shares import START_CHARGE_S
from loractl.common.units import GIB

from .scenes import NOW, Scene, many, scenes


@dataclass
class Reference:
    """The rule once more without laziness: every job is tried in its order."""

    cards: dict[str, Card]
    charges: dict[str, float]
    placed: list[tuple[int, str, Method, int]]
    kept: tuple[int, str, int, int] | None = None
    promised: dict[str, int] = field(default_factory=dict)  # the job for which a card is kept until it is empty

    def run(self, jobs: Sequence[Waiting]) -> None:
        tried: set[int] = set()
        total = max(1.0, sum(self.charges.values()))
        while rest := [j for j in jobs if j.job_id not in tried and not self.at_limit(j.user)]:
            job = min(rest, key=lambda j: (self.counts(j, total), j.job_id))
            self.attempt(job)
            tried.add(job.job_id)

    def counts(self, job: Waiting, total: float) -> float:
        """The work that counts, for waits and priorities that no number overflows at."""
        share = self.charges.get(job.user, 0.0) / total
        return (job.left_s + 7200 * share) * float(0.5 ** (self.age(job) / 86400 + 14 * job.priority))

    def age(self, job: Waiting) -> float:
        return (NOW - job.since).total_seconds()

    def at_limit(self, user: str) -> bool:
        limits = [c.user_limit for c in self.cards.values() if c.open and c.user_limit is not None]
        count = sum(j.user == user for c in self.cards.values() for j in c.running)
        return bool(limits) and count >= min(limits)

    def allowed(self, job: Waiting) -> list[Card]:
        open_ = [c for c in self.cards.values() if c.open]
        largest = max((c.total - c.margin for c in open_ if not c.processor), default=0)
        least = None if None in self.needs(job) else min(n for n in self.needs(job) if n is not None)
        beyond = largest == 0 or (least is not None and least > largest)
        mine = [c for c in open_ if job.only_host is None or c.node.startswith(f"{job.only_host}:")]
        suited = [c for c in mine if job.requires <= c.labels and (beyond or not c.processor)]
        suited = [c for c in suited if self.has_time(job, c, 0.0)]
        sound = [c for c in suited if c.node not in job.avoids and c.node.split(":")[0] not in job.avoids]
        room = [(c, c.total - c.margin - c.outside) for c in sound if c.max_jobs > 0]
        able = [c for c, size in room if size > 0 and (least is None or least <= size)]
        if job.bf16 is not None and any(c.bf16 is job.bf16 for c in able):
            return [c for c in sound if c.bf16 in (None, job.bf16)]
        return sound if able else suited

    def has_time(self, job: Waiting, card: Card, at: float) -> bool:
        took = min(3600.0, (card.window_s or 0.0) / 2) if job.checkpoint_s is None else job.checkpoint_s
        return card.left_s is None or at + took <= card.left_s

    def needs(self, job: Waiting) -> list[int | None]:
        return [job.need.of(method) for method in job.methods]

    def attempt(self, job: Waiting) -> None:
        for method in job.methods:
            need, options = job.need.of(method), []
            for card in self.allowed(job):
                free = card.total - card.margin - card.outside - sum(max(j.reserved, j.used) for j in card.running)
                slots = card.max_jobs - len(card.running)
                if self.kept is not None and self.kept[1] == card.node:
                    room, slots = min(free, self.kept[2]), min(slots, self.kept[3])
                    alone = False
                else:
                    room, alone = free, not card.running
                if card.node in self.promised:
                    continue
                if slots > 0 and room > 0 and (alone or None not in self.needs(job)) and (need or 0) <= room:
                    options.append((len(card.running), free, card.node))
            if options:
                others, free, node = min(options)
                measured = self.cards[node].contention
                costs = 0.5 if measured is None else measured  # next to another, against a card of its own
                costs_s = costs * others * job.left_s
                if empty := self.empties(job, free if need is None else need, costs_s):
                    self.promised[min(empty)[-1]] = job.job_id
                    return
                self.start(job, node, method, free if need is None else need)
                return
        rooms = self.rooms(job)
        if self.kept is None and self.age(job) >= RESERVE_AFTER_S and rooms:
            *_, node, spare, slots = min(rooms)
            self.kept = (job.job_id, node, spare, slots)

    def empties(self, job: Waiting, size: int, costs_s: float) -> list[tuple[float, int, str]]:
        """The cards that will be empty before the job has waited for so long."""
        found = []
        for card in self.allowed(job):
            ends = [(j.ends - NOW).total_seconds() if j.ends else 0.0 for j in card.running]
            if not ends or min(ends) <= 0 or card.capacity < size or not card.max_jobs or card.node in self.promised:
                continue
            free = self.kept is None or self.kept[1] != card.node
            if free and self.age(job) + max(ends) < costs_s and self.has_time(job, card, max(ends)):
                found.append((max(ends), card.capacity, card.node))
        return found

    def start(self, job: Waiting, node: str, method: Method, size: int) -> None:
        self.cards[node] = self.cards[node].with_job(Occupant(job_id=job.job_id, user=job.user, reserved=size))
        self.placed.append((job.job_id, node, method, size))
        self.charges[job.user] = self.charges.get(job.user, 0.0) + size / GIB * START_CHARGE_S / 3600
        if self.kept is not None and self.kept[1] == node:
            number, _, spare, slots = self.kept
            self.kept = (number, node, spare - size, slots - 1)

    def rooms(self, job: Waiting) -> list[tuple[float, int, int, int, str, int, int]]:
        found = []
        for card in (c for c in self.allowed(job) if c.node not in self.promised):
            for index, need in enumerate(self.needs(job)):
                size = max(1, card.capacity) if need is None or None in self.needs(job) else need
                if (room := first_room(card, size)) is not None:
                    at, spare, slots = room
                    if not self.has_time(job, card, at):
                        continue
                    found.append((at, size - card.free, index, card.capacity, card.node, spare, slots))
        return found


def first_room(card: Card, size: int) -> tuple[float, int, int] | None:
    """Seconds until there is room, and what is left beside it: by trying each number of jobs that may end first."""
    leaving = sorted(
        card.running, key=lambda j: (float("inf") if j.ends is None else j.ends.timestamp(), -j.reserved, j.job_id)
    )
    for gone in range(len(leaving) + 1):
        stay = leaving[gone:]
        spare = card.total - card.margin - card.outside - sum(max(j.reserved, j.used) for j in stay) - size
        slots = card.max_jobs - len(stay) - 1
        if spare >= 0 and slots >= 0 and card.capacity >= size:
            ends = [float("inf") if j.ends is None else (j.ends - NOW).total_seconds() for j in leaving[:gone]]
            return max([0.0, *ends]), spare, slots
    return None


@many
@given(scenes())
def test_the_rule_equals_the_plain_reference(scene: Scene) -> None:
    decisions = scene.decide()
    plain = Reference(cards={c.node: c for c in scene.cards}, charges=dict(scene.charges), placed=[])
    plain.run(scene.jobs)
    got = [(d.placed.job.job_id, d.placed.node, d.placed.method, d.placed.reserved) for d in decisions if d.placed]
    assert got == plain.placed
    promised = {d.reserved.node: d.reserved.job.job_id for d in decisions if d.reserved is not None and d.declined}
    assert promised.items() <= plain.promised.items()  # with no room left anywhere nothing need be kept
    kept = [(d.reserved.job.job_id, d.reserved.node) for d in decisions if d.reserved is not None and not d.declined]
    if kept:
        assert plain.kept is not None
        assert kept == [plain.kept[:2]]
