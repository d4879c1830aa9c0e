"""A card as a waiting job sees it: whether it could ever hold the job, when it has room, and who holds it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loractl.common.job.method import Method
from loractl.common.job.need import SharedNeed, least_need
from loractl.common.placement.cards import Card, avoided, holds_now, room_at, suits, takes
from loractl.common.placement.gangs import may_share
from loractl.common.placement.lines import Waiting
from loractl.common.placement.reach import out_of_reach
from loractl.common.placement.shares import within_need
from loractl.common.store.fleet import (
    NODE_STALE_S,
    Avoidance,
    FleetView,
    avoided_by,
    fault_of,
    unreadable,
    waiting_of,
)
from loractl.common.text import clean_line
from loractl.common.units import clock, duration, gib

from .gangs import in_words, room_for_share, shared_way

if TYPE_CHECKING:
    from loractl.common.store.tables import Job


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


@dataclass(frozen=True, kw_only=True)
class Opening:
    """When a card will have room for a job."""

    at: dt.datetime | None  # None: not known
    after: tuple[int, ...]  # the jobs that must end
    only_slot: bool  # the memory is free already

    @property
    def rank(self) -> tuple[bool, dt.datetime]:
        """Orders openings by time; unknown times come last."""
        return self.at is None, self.at or dt.datetime.max.replace(tzinfo=dt.UTC)


def card_fits(job: Job, view: FleetView) -> list[CardFit]:
    """Every card of the fleet as the job sees it."""
    me = waiting_of(vars(job), view.now)
    return [_fit(job, me, card, view) for card in view.cards.values()]


def _fit(job: Job, me: Waiting, card: Card, view: FleetView) -> CardFit:
    def fit(when: str, then: str, at: dt.datetime | None = None) -> CardFit:
        return CardFit(node=card.node, free=card.free, total=card.total, when=when, at=at, then=then)

    if not me.requires <= card.labels:
        return fit("never", "lacks the label " + ", ".join(f"{k}={v}" for k, v in sorted(me.requires - card.labels)))
    if not job.methods:
        return fit("never", "its resources.max_vram is below every need")
    fault = fault_of(view.nodes[card.node])
    gang = shared_way(me, view)
    if card.total and not could_ever_hold(at_last(job, me), card):
        return fit("never", f"card is smaller than {'its share' if gang is not None or not me.alone else 'the job'}")
    if me.only_host not in (None, card.host) and job.result_until is not None:
        text = f"until then {me.only_host} alone may take it: it has the finished result"
        return fit(clock(job.result_until, view.now), text, job.result_until)
    order = view.drain_of(card.node)
    if order is not None:
        until = clock(order.until, view.now) if order.until else "?"
        return fit(until, f"drained by {order.user}: {order.reason}", order.until)
    if not card.open:
        silent = silent_s(view, card.node)
        if fault is not None and silent <= NODE_STALE_S:
            return fit("?", f"closed: {fault}")
        return fit("?", "its worker is stopping" if silent <= NODE_STALE_S else f"not seen for {duration(silent)}")
    if gang is not None:
        return _share(me, gang, card, view, fit)
    if not me.alone:
        return _too_few(at_last(job, me), card, view, fit)
    if card.total and not could_hold_alone(at_last(job, me), card):
        if me.gangs and _enough_at_last(at_last(job, me), card, view):
            return _too_few(at_last(job, me), card, view, fit)
        return fit("never", "card is smaller than the job")
    if not suits_at_last(job, card, view):
        return fit("never", "a processor is for what no GPU of the fleet can hold")
    if avoided(card, me, view.cards.values()):
        why = avoidance_of(job, card, view)
        return fit(clock(why.until, view.now), f"failed it ({why.reason}), avoided until then", why.until)
    if (joins := _joins(me, card, view)) is not None:
        return fit("now", joins, view.now)
    opening = opening_of(me, card, view)
    if opening is None and job.lora_until is not None and not could_ever_hold(me, card):
        until = clock(job.lora_until, view.now)
        return fit(until, "too small for LoRA, which it waits for until then", job.lora_until)
    if opening is None and (still := still_inside(me, card)):
        return fit("?", still)
    if opening is None:
        return fit("?", f"{holder(view, card)}, no end known")
    if not opening.after:
        warm = any(card.has_warm(me.base_model, method) for method in me.methods)
        return fit("now", _now(me, card, view) + (", its base is loaded there" if warm else ""), view.now)
    what = (
        f"{'has a slot' if opening.only_slot else 'fits'} when {when_they_end(opening.after)}{_beyond(me, card, view)}"
    )
    refused = refused_join(me, card, view)
    if opening.at is None:
        return fit("?", f"{what}, which is not known{refused}")
    return fit(clock(opening.at, view.now), what + refused, opening.at)


def _beyond(me: Waiting, card: Card, view: FleetView) -> str:
    """Whose room beyond its need the job would fit into, as words behind those that must end."""
    if me.least is None or me.least <= card.free or not card.slots:
        return ""
    for one in card.running:
        row = view.running.get(one.job_id)
        need = None if row is None else row.vram_qlora if row.method == Method.QLORA.value else row.vram_lora
        if need is not None and me.least <= card.free + one.reserved - within_need(one.reserved, need):
            return f", which took {gib(one.reserved - need)} beyond its need when nobody wanted them"
    return ""


def _share(me: Waiting, gang: SharedNeed, card: Card, view: FleetView, fit: Callable[..., CardFit]) -> CardFit:
    """The card as one of several that are to share the job."""
    size = least_need(me.methods, gang.need)
    text = f"its share is {'–' if size is None else gib(size)} GiB, of {gang.cards} cards"
    room = room_for_share(me, gang, card, view)
    if room is None:
        if (size or 0) > card.usable:
            return fit("never", "can't be one of several cards for it")
        if may_share(card, me) and (size or 1) > card.capacity:
            return fit("?", f"{holder(view, card)}, no end known")
        return _too_few(replace(me, gangs=(gang,)), card, view, fit)
    if not room.after:
        now = _now(me, card, view)
        return fit("now", text if now == "fits" else f"{now}, {text}", view.now)
    text += f", when {when_they_end([job.job_id for job in room.after])}"
    return fit("?" if room.at is None else clock(room.at, view.now), text, room.at)


def _too_few(me: Waiting, card: Card, view: FleetView, fit: Callable[..., CardFit]) -> CardFit:
    """The card of a box that lacks others for the job: for ever, or until they open and are free again."""
    if not may_share(card, me):
        return fit("never", "can't be one of several cards for it")
    if not _enough_at_last(me, card, view):
        return fit("never", f"{card.host} has too few cards for it")
    return fit("?", f"too few cards of {card.host} can have a share of it now")


def _enough_at_last(me: Waiting, card: Card, view: FleetView) -> bool:
    """Whether the card's box could share the job once all its cards are open and everything else has left them."""
    box = [other for other in view.cards.values() if other.host == card.host]
    return may_share(card, me) and out_of_reach(replace(me, alone=False), box) is None


def _joins(me: Waiting, card: Card, view: FleetView) -> str | None:
    """That the rule lets the job train beside others of the card; None: it does not."""
    placed = next((d.placed for d in view.decisions if d.placed and d.placed.job.job_id == me.job_id), None)
    if placed is None or placed.join is None or placed.node != card.node:
        return None
    return f"about to train {beside(job.job_id for job in card.inside(placed.join.base))}"


def beside(jobs: Iterable[int]) -> str:
    """Other jobs in one trainer, like "with jobs 12 and 13 on one base"."""
    numbers = [str(number) for number in sorted(jobs)]
    return f"with {'job' if len(numbers) == 1 else 'jobs'} {in_words(numbers)} on one base"


def refused_join(me: Waiting, card: Card, view: FleetView) -> str:
    """Why the job does not train beside those of the card that have its base; empty where that is no question."""
    refused = view.refused_joins.get((me.job_id, card.node))
    members = [] if refused is None else card.inside(refused.base)
    if refused is None or not members:
        return ""
    return f", not {beside(job.job_id for job in members)}: {refused.why}"


def still_inside(me: Waiting, card: Card) -> str:
    """Which jobs of the card have ended and hold memory until they are out of their trainers, where that is what the
    job waits for; else empty."""
    if not card.leavers or (me.least or 0) > card.capacity:
        return ""
    jobs = [str(one.job_id) for one in card.leavers]
    held, one = gib(sum(one.bytes for one in card.leavers)), len(jobs) == 1
    return (
        f"{'job' if one else 'jobs'} {in_words(jobs)} {'has' if one else 'have'} ended and"
        f" {'holds' if one else 'hold'} {held} until {'it is' if one else 'they are'} out of the trainer"
    )


def _now(me: Waiting, card: Card, view: FleetView) -> str:
    """What the rule does with a card that has room."""
    for decision in view.decisions:
        if decision.placed is not None and any(share.node == card.node for share in decision.placed.shares):
            mine = decision.placed.job.job_id == me.job_id
            return "about to take it" if mine else f"{decision.placed.job.job_id} goes first"
        if decision.reserved is not None and decision.reserved.on(card.node) is not None:
            mine = decision.reserved.job.job_id == me.job_id
            return "kept for it" if mine else f"kept for {decision.reserved.job.job_id}"
    return "fits"


def opening_of(me: Waiting, card: Card, view: FleetView) -> Opening | None:
    """When the card will have room for the job; None: never by itself."""
    if not card.open or not takes(card, me, view.cards.values(), view.largest):
        return None
    openings = []
    for size in {me.need.of(method) for method in me.methods} if me.least is not None else {None}:
        room = room_at(card, size if size is not None else max(1, card.capacity), view.now)
        if room is not None:
            after = tuple(job.job_id for job in room.after)
            openings.append(Opening(at=room.at, after=after, only_slot=size is not None and size <= card.free))
    return min(openings, key=lambda opening: (*opening.rank, len(opening.after)), default=None)


def could_start_now(me: Waiting, card: Card, view: FleetView) -> bool:
    """Whether the card would take the job now if it were first. A job of unknown need gets a card of its own."""
    alone = me.least is not None or not card.running
    held = card.open and alone and holds_now(me, card, view.largest)
    return held and not avoided(card, me, view.cards.values())


def could_ever_hold(me: Waiting, card: Card) -> bool:
    """Whether the card holds the job, or its share of it, once everything else has left it."""
    least = me.bound
    return least is None or least <= card.usable


def could_hold_alone(me: Waiting, card: Card) -> bool:
    """Whether the card holds the whole job once everything else has left it."""
    return me.least is None or me.least <= card.usable


def avoidance_of(job: Job, card: Card, view: FleetView) -> Avoidance:
    """Why the job keeps off a card that failed it, or whose box did."""
    found = avoided_by(job.avoids, view.now)
    return found[card.node] if card.node in found else found[card.host]


def suits_at_last(job: Job, card: Card, view: FleetView) -> bool:
    """Whether the card may take the job, now or once it has waited long enough for LoRA. Its room is not asked."""
    me, largest = waiting_of(vars(job), view.now), view.largest
    return any(suits(card, form, largest) for form in (me, at_last(job, me)))


def at_last(job: Job, me: Waiting) -> Waiting:
    """The job once it has waited long enough for LoRA: with all its methods."""
    return me if unreadable(vars(job)) else replace(me, methods=tuple(Method(name) for name in job.methods))


SILENT_S = 15.0
"""A node writes its row every 5 s. After so long without it a person is told, before it counts as offline."""

FORGOTTEN_S = 3600.0
"""A box that has been silent for longer is no news."""


def trouble_of(view: FleetView, node: str) -> str | None:
    """What is wrong with a card at this moment, in a few words; None where nothing is."""
    order = view.drain_of(node)
    return interruption_of(view, node) or (None if order is None else f"drained by {order.user}")


def interruption_of(view: FleetView, node: str) -> str | None:
    """The same of what ends a job that runs there before its time: on a drained card it runs to its end."""
    silent = silent_s(view, node)
    if silent > SILENT_S:
        return f"silent for {duration(silent)}"
    return "being stopped" if view.nodes[node].draining else None


def listed_cards(view: FleetView) -> list[str]:
    """The cards that a worker serves, or did a while ago."""
    return [name for name in view.cards if silent_s(view, name) < FORGOTTEN_S]


def closed_cards(view: FleetView) -> list[str]:
    """The cards that are silent or drained, each in a few words; a box once where all its cards are."""
    troubles = {name: said for name in listed_cards(view) if (said := trouble_of(view, name))}
    told: dict[str, str] = {}
    for name, said in troubles.items():
        host = view.cards[name].host
        cards = [other for other, card in view.cards.items() if card.host == host]
        whole = all(other in troubles for other in cards)
        told.setdefault(host if whole else name, said)
    return [f"{clean_line(name)} {clean_line(said)}" for name, said in told.items()]


def silent_s(view: FleetView, node: str) -> float:
    """For how long the node has not been seen."""
    return (view.now - view.nodes[node].seen_at).total_seconds()


def holder(view: FleetView, card: Card, *, pid: bool = False) -> str:
    """Who else holds memory of the card, and how much."""
    others = _others(view, card)
    if not others:
        return f"something outside loractl holds {gib(card.outside)}, or did lately"
    number = f" (pid {others[0]['pid']})" if pid and others[0].get("name") else ""
    more = f" and {len(others) - 1} more hold" if len(others) > 1 else " holds"
    return f"{process_name(others[0])}{number}{more} {gib(card.outside)}"


def largest_program(view: FleetView, card: Card) -> str:
    """The largest of other people's programs on the card, by name."""
    others = _others(view, card)
    return process_name(others[0]) if others else "something outside loractl"


def _others(view: FleetView, card: Card) -> list[dict[str, Any]]:
    """Other people's processes on the card, the largest first."""
    return sorted(view.nodes[card.node].outside, key=lambda p: -(p.get("bytes") or 0))


def process_name(process: Mapping[str, object]) -> str:
    """Another person's program, for people."""
    name, user = process.get("name") or f"pid {process['pid']}", process.get("user")
    return f"{name} of {user}" if user else str(name)


def when_they_end(jobs: Sequence[int]) -> str:
    """These jobs and what they do, like "3 and 1 end"."""
    more = f", {jobs[1]} and {len(jobs) - 2} more" if len(jobs) > 2 else f" and {jobs[1]}" if len(jobs) > 1 else ""
    return f"{jobs[0]}{more} {'ends' if len(jobs) == 1 else 'end'}"
