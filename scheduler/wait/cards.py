"""What each card says to a waiting job, in words: the rule's refusals, and who holds the card."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loractl.common.job.method import Method, SharedNeed, least_need
from loractl.common.placement.cards import Card, Obstacle, time_to_checkpoint
from loractl.common.placement.lines import Waiting
from loractl.common.placement.refusals import Full, Refusal, Taken
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

from .gangs import when_they_end

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
class Asking:
    """A waiting job, and what the rule says to it for each card."""

    job: Job
    me: Waiting
    at_last: Waiting  # once it has waited long enough for LoRA: with all its methods
    gang: SharedNeed | None  # how several cards would share it; None: it takes one card
    refusals: Mapping[str, Refusal | None]

    @classmethod
    def of(cls, job: Job, view: FleetView) -> Asking:
        me = waiting_of(vars(job), view.now)
        at_last = me if unreadable(vars(job)) else replace(me, methods=tuple(Method(name) for name in job.methods))
        refusals = view.round.refusals(me, at_last)
        return cls(job=job, me=me, at_last=at_last, gang=view.round.gang_of(me), refusals=refusals)

    @property
    def full(self) -> dict[str, Full]:
        """The cards that will have room."""
        return {node: refusal for node, refusal in self.refusals.items() if isinstance(refusal, Full)}


def card_fits(job: Job, view: FleetView) -> list[CardFit]:
    """Every card of the fleet as the job sees it."""
    asking = Asking.of(job, view)
    return [_fit(asking, card, view) for card in view.cards.values()]


def _fit(asking: Asking, card: Card, view: FleetView) -> CardFit:
    refusal = asking.refusals[card.node]
    at: dt.datetime | None = None
    if isinstance(refusal, Obstacle):
        when, then, at = _kept_off(refusal, asking, card, view)
    elif isinstance(refusal, Full):
        at, when = refusal.at, "?" if refusal.at is None else clock(refusal.at, view.now)
        then = _full(refusal, asking, card, view)
    else:
        at, when, then = view.now, "now", _now(refusal, asking, card, view)
    return CardFit(node=card.node, free=card.free, total=card.total, when=when, at=at, then=then)


def _kept_off(
    obstacle: Obstacle, asking: Asking, card: Card, view: FleetView
) -> tuple[str, str, dt.datetime | None]:  # when, then, at
    job, me = asking.job, asking.me
    match obstacle:
        case Obstacle.LABELS:
            lacking = ", ".join(f"{key}={value}" for key, value in sorted(me.requires - card.labels))
            return "never", f"lacks the label {lacking}", None
        case Obstacle.SMALL:
            shared = asking.gang is not None or not me.alone
            return "never", f"card is smaller than {'its share' if shared else 'the job'}", None
        case Obstacle.RESULT if job.result_until is not None:
            text = f"until then, only {me.only_host} may take the job: it has the finished result"
            return clock(job.result_until, view.now), text, job.result_until
        case Obstacle.CLOSED:
            return _closed(card, view)
        case Obstacle.TOO_FEW:
            return "never", f"{card.host} has too few cards for it", None
        case Obstacle.TOO_FEW_NOW:
            return "?", f"too few cards of {card.host} can hold a share of it now", None
        case Obstacle.AVOIDED:
            why = avoidance_of(job, card, view)
            return clock(why.until, view.now), f"failed the job ({why.reason}), which avoids it until then", why.until
        case Obstacle.FORMAT:
            return "?", f"{other_format(me)}, and another open card does", None
        case Obstacle.PATIENCE if job.lora_until is not None:
            text = "too small for LoRA, for which the job waits until then"
            return clock(job.lora_until, view.now), text, job.lora_until
        case Obstacle.TIME:
            return "never", short_of_time(me, card, view), None
        case Obstacle.PROGRAMS:
            return "?", f"{holder(view, card)} for an unknown time", None
    return "never", NEVER[obstacle], None


def short_of_time(me: Waiting, card: Card, view: FleetView) -> str:
    """Why the job does not begin on a card whose worker stops."""
    ends, took = clock(view.nodes[card.node].until, view.now), me.checkpoint_s
    if took is not None:
        return f"stops at {ends}, but the job needs {duration(took)} to store its first checkpoint"
    least = duration(time_to_checkpoint(card, me))
    return f"stops at {ends}, but the job's time to a checkpoint is not known, so it starts only with {least} left"


NEVER = {
    Obstacle.METHODS: "the job's resources.max_vram is less than it needs with any method",
    Obstacle.UNSHARED: "can't share the job with other cards",
    Obstacle.PROCESSOR: "a processor takes only jobs that no GPU of the fleet can hold",
}


def _closed(card: Card, view: FleetView) -> tuple[str, str, dt.datetime | None]:
    order = view.drain_of(card.node)
    if order is not None:
        until = clock(order.until, view.now) if order.until else "?"
        return until, f"drained by {order.user}: {order.reason}", order.until
    fault, silent = fault_of(view.nodes[card.node]), silent_s(view, card.node)
    if silent > NODE_STALE_S:
        return "?", f"not seen for {duration(silent)}", None
    return "?", "its worker is stopping" if fault is None else f"closed: {fault}", None


def _now(taken: Taken | None, asking: Asking, card: Card, view: FleetView) -> str:
    """What the rule does with a card that has room."""
    me, placed = asking.me, view.round.placed.get(asking.me.job_id)
    if taken is not None and taken.given:
        said = f"job {taken.given[0].job_id} goes first"
    elif taken is not None and taken.kept_for is not None:
        said = "kept for it" if taken.kept_for.job_id == me.job_id else f"kept for job {taken.kept_for.job_id}"
    else:
        mine = placed is not None and any(share.node == card.node for share in placed.shares)
        said = "about to take it" if mine else "fits"
    if asking.gang is not None:
        return _share(asking) if said == "fits" else f"{said}, {_share(asking)}"
    return said


def _share(asking: Asking) -> str:
    gang = asking.gang
    size = None if gang is None else least_need(asking.me.methods, gang.need)
    return f"its share is {'–' if size is None else gib(size)} GiB on each of {gang.cards if gang else 1} cards"


def _full(full: Full, asking: Asking, card: Card, view: FleetView) -> str:
    ends = f"when {when_they_end(full.after)}"
    if asking.gang is not None:
        return f"{_share(asking)}, {ends}"
    unknown = " (time not known)" if full.at is None else ""
    return f"{'has a slot' if full.only_slot else 'fits'} {ends}{unknown}{_beyond(asking.me, card, view)}"


def _beyond(me: Waiting, card: Card, view: FleetView) -> str:
    """A running job that took memory beyond its need in which the waiting job would fit, to follow the jobs that must
    end."""
    if me.least is None or me.least <= card.free or not card.slots:
        return ""
    for one in card.running:
        row = view.running.get(one.job_id)
        need = None if row is None else row.vram_qlora if row.method == Method.QLORA.value else row.vram_lora
        if need is not None and me.least <= card.free + one.reserved - within_need(one.reserved, need):
            return f", which took {gib(one.reserved - need)} GiB beyond its need while nobody else wanted it"
    return ""


def other_format(me: Waiting) -> str:
    """Why the job keeps off a card that computes in another number format than its checkpoint."""
    return (
        "does not compute in bfloat16, as its checkpoint does"
        if me.bf16
        else "computes in bfloat16, its checkpoint not"
    )


def avoidance_of(job: Job, card: Card, view: FleetView) -> Avoidance:
    """Why the job avoids a card that failed it, or whose box did."""
    found = avoided_by(job.avoids, view.now)
    return found[card.node] if card.node in found else found[card.host]


SILENT_S = 15.0
"""A node writes its row every 5 s. After this time without it people see a warning, before it counts as offline."""

FORGOTTEN_S = 3600.0
"""A card that has been silent for longer is no longer reported."""


def trouble_of(view: FleetView, node: str) -> str | None:
    """What is wrong with a card at this moment, in a few words; None if nothing is."""
    order = view.drain_of(node)
    return interruption_of(view, node) or (None if order is None else f"drained by {order.user}")


def interruption_of(view: FleetView, node: str) -> str | None:
    """The same, but only what would end a running job early: on a drained card it runs to its end."""
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


def holder(view: FleetView, card: Card, *, pid: bool = False) -> str:
    """Who else holds memory of the card, and how much."""
    others = _others(view, card)
    if not others:
        return f"something outside loractl holds, or recently held, {gib(card.outside)} GiB"
    number = f" (pid {others[0]['pid']})" if pid and others[0].get("name") else ""
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
