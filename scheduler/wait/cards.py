"""What each card says to a waiting job, and what is wrong with cards."""

from __future__ import annotations

import datetime as dt
import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loractl import __version__
from loractl.common.job.method import Method, SharedNeed, least_need
from loractl.common.placement.cards import (
    Card,
    Obstacle,
    Room,
    avoided,
    could_start,
    failed,
    lasts,
    room_at,
    room_for,
    time_to_checkpoint,
    unsuited,
)
from loractl.common.placement.duration import CONTENTION
from loractl.common.placement.gangs import gang_of, may_share
from loractl.common.placement.lines import Waiting, waited
from loractl.common.placement.refusals import out_of_reach
from loractl.common.placement.rule import Term, deciding
from loractl.common.store.fleet import NODE_STALE_S, OLDER, FleetView, avoided_by, waiting_of
from loractl.common.store.tables import Job
from loractl.common.text import clean_line, numbers, when_they_end
from loractl.common.units import clock, duration, gib

KEPT = " (kept for it)"


class Chance(enum.IntEnum):
    """What a card may say to a job, the best first: the best card gives the job's reason."""

    GIVEN = 1  # the rule gives it the job
    FREE = 2  # it has room that is nobody's
    TAKEN = 3  # it has room, which other jobs get
    REFUSED = 4  # it has room, but the job keeps off it while another card may come
    KEPT = 5  # it will have room, and is kept for the job
    FULL = 6  # it will have room
    LATER = 7  # the job keeps off it, and it has no room either
    TIME = 8  # its worker stops too soon
    PROGRAMS = 9  # other programs hold too much of it
    DRAINED = 10  # from here on no open card could hold the job
    CLOSED = 11
    FEW = 12  # its box lacks other cards for the job
    PROCESSOR = 13
    STOPPING = 14
    OFFLINE = 15
    ELSEWHERE = 16  # another box has the job's result
    NEVER = 17


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one card says to a job."""

    chance: Chance
    word: str
    text: str  # follows the card's name in a sentence
    at: dt.datetime | None = None  # when that ends

    def when(self, now: dt.datetime) -> str:
        """When the card alone could hold the job: now, a time, never, or ? if that is not known."""
        if self.chance <= Chance.TAKEN:
            return "now"
        if self.chance in (Chance.NEVER, Chance.PROCESSOR, Chance.TIME):
            return "never"
        return "?" if self.at is None else clock(self.at, now)

    @property
    def then(self) -> str:
        """As short as a table has it."""
        if self.text.startswith("when "):
            return f"{'has a slot' if self.word == 'busy' else 'fits'} {self.text}"
        return self.text.removeprefix("is ")


@dataclass(frozen=True, kw_only=True)
class CardFit:
    """One card as a job sees it."""

    node: str
    free: int
    total: int
    when: str  # now, a time, never, ?
    at: dt.datetime | None
    then: str

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names; `free` and `total` in bytes, `at` as ISO 8601."""
        return {**vars(self), "at": None if self.at is None else self.at.isoformat()}


def card_fits(job: Job, view: FleetView) -> list[CardFit]:
    """Every card of the fleet as the job sees it."""
    return [_fit(view.cards[node], said, view.now) for node, said in Asking.of(job, view).offers.items()]


def _fit(card: Card, said: Offer, now: dt.datetime) -> CardFit:
    at = now if said.chance <= Chance.TAKEN else said.at
    return CardFit(node=card.node, free=card.free, total=card.total, when=said.when(now), at=at, then=said.then)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A waiting job that asks every card."""

    job: Job
    me: Waiting
    at_last: Waiting  # once it has waited long enough for LoRA: with all its methods
    gang: SharedNeed | None  # how several cards would share it; None: it takes one card
    view: FleetView

    @classmethod
    def of(cls, job: Job, view: FleetView) -> Asking:
        me = waiting_of(vars(job), view.now)
        at_last = replace(me, methods=tuple(map(Method, job.methods)))
        gang = gang_of(me, view.cards.values()) if me.gangs else None
        return cls(job=job, me=me, at_last=at_last, gang=gang, view=view)

    @functools.cached_property
    def offers(self) -> dict[str, Offer]:
        """What each card says."""
        return {node: self._offer(card) for node, card in self.view.cards.items()}

    def _offer(self, card: Card) -> Offer:
        """The first that applies: what holds for ever, what people and workers say, what the job waits for."""
        job, me, at_last, cards, now = self.job, self.me, self.at_last, self.view.cards.values(), self.view.now
        obstacle = unsuited(card, at_last, self.view.largest)
        if obstacle is Obstacle.LABELS:
            lacking = ", ".join(f"{key}={value}" for key, value in sorted(me.requires - card.labels))
            return _never(f"lacks the label {lacking}")
        if not at_last.methods:
            return _never("takes nothing: the job's resources.max_vram is less than it needs")
        if card.total and (at_last.bound or 0) > card.usable:
            shared = self.gang is not None or not me.alone
            return _never(f"is smaller than {'its share' if shared else 'the job'}")
        if obstacle is Obstacle.RESULT:
            text = f"may not take it until then: {me.only_host} has its finished result"
            return Offer(chance=Chance.ELSEWHERE, word="result", text=text, at=job.result_until)
        if not card.open:
            return _closed(card, self.view)
        if not lasts(card, me):
            return self._short_of_time(card)
        if self.gang is not None:
            return self._share(card, self.gang)
        if obstacle is Obstacle.SEVERAL:
            return self._too_few(at_last, card)
        if card.total and (at_last.least or 0) > card.usable:
            few = me.gangs and self._enough_at_last(at_last, card)
            return self._too_few(at_last, card) if few else _never("is smaller than the job")
        if obstacle is Obstacle.PROCESSOR and unsuited(card, me, self.view.largest) is not None:
            text = "is a processor, which takes only jobs that no GPU of the fleet can hold"
            return Offer(chance=Chance.PROCESSOR, word="worker", text=text)
        if avoided(card, me, cards):
            return self._avoided(card)
        if (found := self._room(card)) is not None:
            return self._full(card, *found)
        if me.methods != at_last.methods and (me.bound or 0) > card.usable:
            text = "is too small for LoRA, for which the job waits until then"
            return Offer(chance=Chance.LATER, word="patience", text=text, at=job.lora_until)
        if card.left_s is not None and room_at(card, max(1, me.least or card.capacity), now) is not None:
            return self._short_of_time(card)
        return self._programs(card)

    def _room(self, card: Card) -> tuple[int | None, Room] | None:
        """When the card has room for the job, by the method with which that is soonest; None: never by itself."""
        me, now = self.me, self.view.now
        sizes = {None} if me.least is None else {me.need.of(method) for method in me.methods}
        rooms = [(size, room_for(card, me, size or max(1, card.capacity), now)) for size in sizes]
        known = [(size, room) for size, room in rooms if room is not None]
        return min(known, key=lambda one: (one[1].at is None, one[1].at or now, len(one[1].after)), default=None)

    def _full(self, card: Card, size: int | None, room: Room) -> Offer:
        """Of a card that has room, now or once others have ended."""
        if not room.after:
            return self._taken(card)
        kept = self.view.kept.get(card.node)
        mine = kept is not None and kept.job.job_id == self.me.job_id
        only_slot = size is not None and size <= card.free
        chance = Chance.KEPT if mine else Chance.FULL
        if stopping := [one.job_id for one in card.running if one.gives_way_to == self.me.job_id]:
            text = f"when {numbers(stopping)} {'gives' if len(stopping) == 1 else 'give'} way to it"
            return Offer(chance=chance, word="yields", text=text, at=room.at)
        return Offer(
            chance=chance,
            word="busy" if only_slot else "memory",
            text=f"when {when_they_end([job.job_id for job in room.after])}{KEPT if mine else ''}",
            at=room.at,
        )

    def _taken(self, card: Card) -> Offer:
        """What the rule does with a card that has room."""
        me, view = self.me, self.view
        here = view.starting.get(card.node, [])
        if any(other.job_id == me.job_id for other in here):
            return Offer(chance=Chance.GIVEN, word="next", text="is about to take it")
        declined = view.declined.get(me.job_id)
        if declined is not None and (card.running or card.node == declined.node):
            (empty,) = [node for node, kept in view.kept.items() if kept.job.job_id == me.job_id]
            shared = view.cards[declined.node].contention
            longer = f"{CONTENTION:.0%} longer (assumed)" if shared is None else f"{shared:.0%} longer (measured)"
            text = f"has room next to others, where the job takes {longer} for each"
            text += f"; it is sooner done alone on {empty}, which is kept for it"
            return Offer(chance=Chance.FREE, word="alone", text=text)
        if here:
            first = here[-1]
            why, word = "", "order"
            match deciding(first, me, view.charges, view.by_share):
                case Term.PRIORITY:
                    why = ": its priority is higher"
                case Term.LEFT:
                    why = f": its work counts as {duration(first.left_s)}, this one's as {duration(me.left_s)}"
                case Term.USE:
                    why, word = f": {first.user} has used the cards less", "share"
                case Term.WAIT:
                    why = f": it has waited for {duration(waited(first, view.now))}"
            return Offer(chance=Chance.TAKEN, word=word, text=f"goes to job {first.job_id} first{why}")
        kept = view.kept.get(card.node)
        if kept is not None and kept.job.job_id != me.job_id:
            return Offer(chance=Chance.TAKEN, word="kept", text=f"is kept for job {kept.job.job_id}, which goes first")
        return Offer(
            chance=Chance.FREE, word="order", text="has room for it" if self.gang is None else "has room for its share"
        )

    def _share(self, card: Card, gang: SharedNeed) -> Offer:
        """What a card says that is to be one of several."""
        me, size = self.me, least_need(self.me.methods, gang.need)

        def room(other: Card) -> Room | None:
            return room_for(other, me, size or max(1, other.capacity), self.view.now) if may_share(other, me) else None

        mine, box = room(card), [other for other in self.view.cards.values() if other.host == card.host]
        if mine is not None and sum(room(other) is not None for other in box) >= gang.cards:
            return self._full(card, size, mine)
        if (size or 0) > card.usable or not may_share(card, me):
            return _never("can't share the job with other cards")
        return self._programs(card) if (size or 1) > card.capacity else self._too_few(replace(me, gangs=(gang,)), card)

    def _too_few(self, asked: Waiting, card: Card) -> Offer:
        """Of a card whose box lacks others for the job: for ever, or until they open and are free again."""
        if not may_share(card, asked):
            return _never("can't share the job with other cards")
        if not self._enough_at_last(asked, card):
            return _never("has too few other cards in its box")
        if card.outside and (asked.bound or 1) > card.capacity:
            return self._programs(card)
        return Offer(
            chance=Chance.FEW, word="worker", text="has too few other cards in its box that can hold a share now"
        )

    def _enough_at_last(self, asked: Waiting, card: Card) -> bool:
        """Whether the card's box could share the job once all its cards are open and all else has left them."""
        box = [other for other in self.view.cards.values() if other.host == card.host]
        return may_share(card, asked) and out_of_reach(replace(asked, alone=False), box) is None

    def _avoided(self, card: Card) -> Offer:
        """Of a card that failed the job, or computes in another number format than its checkpoint."""
        me, found = self.me, avoided_by(self.job.avoids, self.view.now)
        has_room = could_start(replace(me, avoids=frozenset(), bf16=None), card, self.view.cards.values())
        chance = Chance.REFUSED if has_room else Chance.LATER
        if not failed(card, me):
            is_not = "does not compute in bfloat16, as its checkpoint does" if me.bf16 else "computes in bfloat16, its"
            text = f"{is_not}{'' if me.bf16 else ' checkpoint not'}, so it waits for another card"
            return Offer(chance=chance, word="format", text=text)
        why = found[card.node] if card.node in found else found[card.host]
        did = "has a loractl too old to read it" if why.reason == OLDER else f"failed it ({why.reason})"
        text = f"{did}, so it waits for another card until {clock(why.until, self.view.now)}"
        return Offer(chance=chance, word="avoids", text=text, at=why.until)

    def _short_of_time(self, card: Card) -> Offer:
        """Of a card whose worker stops too soon."""
        ends, took = clock(self.view.nodes[card.node].until, self.view.now), self.me.checkpoint_s
        text = f"stops at {ends}, but the job needs {duration(took)} to store its first checkpoint"
        if took is None:
            least = duration(time_to_checkpoint(card, self.me))
            text = (
                f"stops at {ends}, but the job's time to a checkpoint is not known, so it starts only with {least} left"
            )
        return Offer(chance=Chance.TIME, word="time", text=text)

    def _programs(self, card: Card) -> Offer:
        text = f"has {gib(card.capacity)} GiB left: {holder(self.view, card)}"
        return Offer(chance=Chance.PROGRAMS, word="memory", text=text)


def _never(text: str) -> Offer:
    return Offer(chance=Chance.NEVER, word="never", text=text)


def _closed(card: Card, view: FleetView) -> Offer:
    """Of a card that is silent, drained, at fault or being stopped."""
    node, order, silent = view.nodes[card.node], view.drain_of(card.node), silent_s(view, card.node)
    if silent > NODE_STALE_S:
        theirs = node.versions.get("loractl", __version__)
        if _minor(theirs) != _minor(__version__):
            text = f"ran loractl {theirs}, this is {__version__}: upgrade its worker"
            return Offer(chance=Chance.OFFLINE, word="version", text=text)
        return Offer(chance=Chance.OFFLINE, word="offline", text=f"was last seen {duration(silent)} ago")
    if order is not None:
        until = f" until {clock(order.until, view.now)}" if order.until else ""
        text = f"is drained by {order.user}{until}: {order.reason}"
        return Offer(chance=Chance.DRAINED, word="drained", text=text, at=order.until)
    if (fault := node.fault) is not None:
        return Offer(chance=Chance.CLOSED, word="closed", text=f"is closed: {fault}")
    return Offer(chance=Chance.STOPPING, word="stopping", text="is closed: its worker is being stopped")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


SILENT_S = 15.0
"""A node writes its row every 5 s. After this time without it people see a warning, before it counts as offline."""

FORGOTTEN_S = 3600.0
"""A card that has been silent for longer is no longer reported."""


def trouble_of(view: FleetView, node: str) -> str | None:
    """What is wrong with a card at this moment, in a few words; None if nothing is."""
    order = view.drain_of(node)
    return interruption_of(view, node) or (None if order is None else f"drained by {order.user}")


def interruption_of(view: FleetView, node: str) -> str | None:
    """What would end a running job early on this card, in a few words; on a drained card it runs to its end."""
    silent = silent_s(view, node)
    if silent > SILENT_S:
        return f"silent for {duration(silent)}"
    return "being stopped" if view.nodes[node].draining else None


def listed_cards(view: FleetView) -> list[str]:
    """The cards that a worker serves, or did until recently."""
    return [name for name in view.cards if silent_s(view, name) < FORGOTTEN_S]


def closed_cards(view: FleetView) -> list[str]:
    """The cards that are silent or drained, each in a few words; a box once if all its cards are."""
    troubles = {name: said for name in listed_cards(view) if (said := trouble_of(view, name))}
    told: dict[str, str] = {}
    for name, said in troubles.items():
        host = view.cards[name].host
        cards = [other for other, card in view.cards.items() if card.host == host]
        whole = all(other in troubles for other in cards)
        told.setdefault(host if whole else name, said)
    return [f"{clean_line(name)} {clean_line(said)}" for name, said in told.items()]


def silent_s(view: FleetView, node: str) -> float:
    """How long the node has not been seen."""
    return (view.now - view.nodes[node].seen_at).total_seconds()


def holder(view: FleetView, card: Card) -> str:
    """Who else holds memory of the card, and how much."""
    others = _others(view, card)
    if not others:
        return f"something outside loractl holds, or recently held, {gib(card.outside)} GiB"
    number = f" (pid {others[0]['pid']})" if others[0].get("name") else ""
    more = f" and {len(others) - 1} more hold" if len(others) > 1 else " holds"
    return f"{process_name(others[0])}{number}{more} {gib(card.outside)} GiB"


def largest_program(view: FleetView, card: Card) -> str:
    """The largest of other people's programs on the card, by name."""
    others = _others(view, card)
    return process_name(others[0]) if others else "something outside loractl"


def _others(view: FleetView, card: Card) -> list[dict[str, Any]]:
    """Other people's processes on the card, the largest first."""
    return sorted(view.nodes[card.node].outside, key=lambda p: -(p.get("bytes") or 0))


def process_name(process: Mapping[str, object]) -> str:
    """Another person's program, like "python of mara"."""
    name, user = process.get("name") or f"pid {process['pid']}", process.get("user")
    return f"{name} of {user}" if user else str(name)
