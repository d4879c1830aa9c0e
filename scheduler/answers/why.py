"""Why a job waits, as a word and a sentence, card by card, and when it will start. Pure: from rows and cards.

The highest tier that holds gives the reason: it can never start; a rule or a wish holds it; the fleet has no card open
for it; the memory is taken. What is decided by the placement rule is asked of the rule itself.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loractl import __version__
from loractl.common.job.method import Method
from loractl.common.job.need import Need
from loractl.common.placement.cards import Card, could_start, largest_gpu, room_at, suits
from loractl.common.placement.lines import Waiting
from loractl.common.store.fleet import NODE_STALE_S, FleetView, waiting_of
from loractl.common.units import duration, gib

if TYPE_CHECKING:
    from loractl.common.store.tables import Job

AT_ONCE_S = 20.0
"""A job that the rule places and that waits no longer than this is just about to be looked at."""

REPLAYED_JOBS = 200
"""With more waiting jobs no expected start is given: it would hang on too many unknown durations."""


class Tier(enum.IntEnum):
    """Which kind of reason; the first that holds is told."""

    NEVER = 1
    POLICY = 2
    FLEET = 3
    CAPACITY = 4
    NEXT = 5  # nothing is in its way


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Why a job waits."""

    tier: Tier
    word: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}"


@dataclass(frozen=True, kw_only=True)
class Start:
    """When and where a job is expected to start."""

    at: dt.datetime
    spread_s: float  # half width, from the spread of the running jobs' measured steps
    node: str


@dataclass(frozen=True, kw_only=True)
class CardFit:
    """One card as a job sees it."""

    node: str
    free: int
    total: int
    when: str  # now, a time, never, ?
    at: dt.datetime | None
    then: str


def explain(job: Job, view: FleetView) -> Wait:
    """The reason for a QUEUED job."""
    me = waiting_of(vars(job), view.now)
    for tier in (_never, _held_back, _nobody_there):
        found = tier(job, _at_last(job, me), view)
        if found is not None:
            return found
    return _capacity(job, me, view)


def _at_last(job: Job, me: Waiting) -> Waiting:
    """The job once it has waited long enough for LoRA: with all its methods."""
    return replace(me, methods=tuple(Method(name) for name in job.methods))


def _never(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    def never(sentence: str) -> Wait:
        return Wait(tier=Tier.NEVER, word="never", sentence=sentence)

    if not me.methods:
        return never(f"its resources.max_vram, {gib(job.spec['resources']['max_vram'])}, is below every need")
    if not view.cards:
        return None
    labelled = [card for card in view.cards.values() if me.requires <= card.labels]
    if not labelled:
        return never(f"no box has the label {', '.join(f'{k}={v}' for k, v in sorted(me.requires))}")
    gpus = [card for card in labelled if not card.processor] or labelled
    largest = max(gpus, key=lambda card: card.usable)
    least = me.least
    if least is not None and least > max(card.usable for card in labelled):
        return never(f"needs {gib(least)}, the largest card has {gib(largest.usable)}")
    return None


def _held_back(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    if job.held:
        return Wait(tier=Tier.POLICY, word="held", sentence=job.message or "until loractl retry")
    if job.not_before is not None and job.not_before > view.now:
        wait = duration((job.not_before - view.now).total_seconds())
        if job.message is not None and job.reason is None:  # no attempt ended: a worker of an older version saw it
            return Wait(tier=Tier.POLICY, word="version", sentence=job.message)
        return Wait(tier=Tier.POLICY, word="retry", sentence=f"attempt {job.attempt + 1} in {wait}")
    limit, mine = _user_limit(view), sum(running.user == job.user for running in view.running.values())
    if limit is not None and mine >= limit:
        return Wait(tier=Tier.POLICY, word="limit", sentence=f"{job.user} runs {mine}, the limit is {limit}")
    return None


def _user_limit(view: FleetView) -> int | None:
    """Jobs that one user may run: the smallest limit of all open cards."""
    return min((c.user_limit for c in view.cards.values() if c.open and c.user_limit is not None), default=None)


def _nobody_there(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    """No open card could ever hold it, though a closed one could."""

    def fleet(word: str, sentence: str) -> Wait:
        return Wait(tier=Tier.FLEET, word=word, sentence=sentence)

    holding = [card for card in view.cards.values() if me.requires <= card.labels and _ever(me, card)]
    if any(card.open and _suits(job, card, view) for card in holding):
        return None
    online = [card for card in holding if _silent_s(view, card.node) <= NODE_STALE_S]
    for card in online:
        order = view.drain_of(card.node)
        if order is not None:
            until = f" until {_clock(order.until, view.now)}" if order.until else ""
            return fleet("drained", f"{card.node} by {order.user}{until}: {order.reason}")
    left_out = next((card for card in online if card.open), None)
    if left_out is not None:
        what = "a processor, for what no GPU of the fleet can hold; no GPU with its labels is online"
        return fleet("worker", f"{left_out.node} is {what}")
    if online:
        return fleet("stopping", f"the worker of {online[0].node} is being stopped")
    if not holding:
        return fleet("worker", "no worker is online: start loractl worker on a box")
    best = min(holding, key=lambda card: _silent_s(view, card.node))
    theirs = view.nodes[best.node].versions.get("loractl", __version__)
    if _minor(theirs) != _minor(__version__):
        return fleet("version", f"{best.node} ran loractl {theirs}, this is {__version__}: upgrade its worker")
    return fleet("offline", f"{best.node} was last seen {duration(_silent_s(view, best.node))} ago")


def _capacity(job: Job, me: Waiting, view: FleetView) -> Wait:
    def wait(word: str, sentence: str) -> Wait:
        return Wait(tier=Tier.CAPACITY, word=word, sentence=sentence)

    for decision in view.decisions:
        if decision.placed is not None and decision.placed.job.job_id == job.job_id:
            age = (view.now - job.submitted_at).total_seconds()
            late = "" if age <= AT_ONCE_S else f", waiting {duration(age)}"
            return Wait(tier=Tier.NEXT, word="next", sentence=f"{decision.placed.node} is about to take it{late}")
    taken = {d.placed.node: d.placed.job for d in view.decisions if d.placed is not None}
    kept = next((d.reserved for d in view.decisions if d.reserved is not None), None)
    startable = [card for card in view.cards.values() if _could_start(me, card, view)]
    own = next((d.placed for d in view.decisions if d.placed is not None and d.placed.job.user == me.user), None)
    if own is not None and any(c.node not in taken and (kept is None or kept.node != c.node) for c in startable):
        # a card is left for it, and yet the rule passed it over
        text = f"{own.job.job_id} goes first on {own.node}, and {me.user} may run {_user_limit(view)} at a time"
        return wait("limit", text)
    for card in startable:
        if card.node in taken:
            return _passed_over(me, taken[card.node], card.node)
        if kept is not None and kept.node == card.node and kept.job.job_id != job.job_id:
            return wait("kept", f"{card.node} is kept for {kept.job.job_id}, which goes first")
    mine = " (kept for it)" if kept is not None and kept.job.job_id == job.job_id else ""
    options = [(fit, card) for card in view.cards.values() if (fit := _opening(me, card, view)) is not None]
    if job.lora_until is not None and job.lora_until > view.now:
        until, whole = _clock(job.lora_until, view.now), _at_last(job, me)
        small = next((c for c in view.cards.values() if _could_start(whole, c, view)), None)
        if small is not None:
            return wait("patience", f"until {until} for LoRA; QLoRA would fit on {small.node} now")
        if not options:
            return wait("patience", f"until {until} for LoRA, for which no card has room; then for QLoRA")
    if options:
        (_, after, busy), card = min(options, key=lambda o: (o[0][0] is None, o[0][0] or view.now, o[1].node))
        if kept is not None and mine:
            for found, other in options:
                if other.node == kept.node:
                    (_, after, busy), card = found, other
        return wait("busy" if busy else "memory", f"{card.node} when {_end(after)}{mine}")
    blocked = max(
        (c for c in view.cards.values() if c.open and suits(c, me, largest_gpu(view.cards.values())) and _ever(me, c)),
        key=lambda c: c.capacity,
    )
    held = _holder(view, blocked, pid=True)
    return wait("memory", f"{held} on {blocked.node}, {gib(blocked.capacity)} are left")


def _passed_over(me: Waiting, first: Waiting, node: str) -> Wait:
    if first.priority > me.priority:
        return Wait(tier=Tier.CAPACITY, word="order", sentence=f"{first.job_id} has a higher priority on {node}")
    if first.user != me.user and first.job_id > me.job_id:
        text = f"{first.user} had less of the cards: {first.job_id} goes first on {node}"
        return Wait(tier=Tier.CAPACITY, word="share", sentence=text)
    return Wait(tier=Tier.CAPACITY, word="order", sentence=f"{first.job_id} goes first on {node}")


def _opening(me: Waiting, card: Card, view: FleetView) -> tuple[dt.datetime | None, list[int], bool] | None:
    """When the card will have room (None: not known), the jobs that must end, and whether only a slot is missing."""
    if not card.open or not suits(card, me, largest_gpu(view.cards.values())):
        return None
    rooms = []
    for size in {me.need.of(method) for method in me.methods} if me.least is not None else {None}:
        room = room_at(card, size if size is not None else max(1, card.capacity), view.now)
        if room is not None:
            rooms.append((room, size is not None and size <= card.free))
    if not rooms:
        return None
    room, only_slot = min(rooms, key=lambda found: (found[0].at is None, found[0].at or view.now, len(found[0].after)))
    return room.at, [job.job_id for job in room.after], only_slot


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
    if not _ever(_at_last(job, me), card):
        return fit("never", "card is smaller than the job")
    order = view.drain_of(card.node)
    if order is not None:
        until = _clock(order.until, view.now) if order.until else "?"
        return fit(until, f"drained by {order.user}: {order.reason}", order.until)
    if not card.open:
        silent = _silent_s(view, card.node)
        return fit("?", "its worker is stopping" if silent <= NODE_STALE_S else f"not seen for {duration(silent)}")
    if not _suits(job, card, view):
        return fit("never", "a processor is for what no GPU of the fleet can hold")
    opening = _opening(me, card, view)
    if opening is None and job.lora_until is not None and not _ever(me, card):
        return fit(
            _clock(job.lora_until, view.now), "too small for LoRA, which it waits for until then", job.lora_until
        )
    if opening is None:
        return fit("?", f"{_holder(view, card)}, no end known")
    at, after, busy = opening
    if not after:
        return fit("now", _now(me, card, view), view.now)
    what = "has a slot when" if busy else "fits when"
    if at is None:
        return fit("?", f"{what} {_end(after)}, which is not known")
    return fit(_clock(at, view.now), f"{what} {_end(after)}", at)


def _now(me: Waiting, card: Card, view: FleetView) -> str:
    for decision in view.decisions:
        if decision.placed is not None and decision.placed.node == card.node:
            mine = decision.placed.job.job_id == me.job_id
            return "about to take it" if mine else f"{decision.placed.job.job_id} goes first"
        if decision.reserved is not None and decision.reserved.node == card.node:
            mine = decision.reserved.job.job_id == me.job_id
            return "kept for it" if mine else f"kept for {decision.reserved.job.job_id}"
    return "fits"


def expected_starts(view: FleetView, waiting: Sequence[Waiting]) -> dict[int, Start]:
    """When the ready jobs start, where that hangs on running jobs alone whose ends are measured.

    A job that waits has no known duration: what can only start after it gets no time.
    """
    from loractl.common.placement.replay import PlacementRule, ReplayedJob, replay

    if len(waiting) > REPLAYED_JOBS:
        return {}
    jobs = [ReplayedJob(waiting=job, seconds=None) for job in waiting]

    def run(cards: Sequence[Card]) -> Mapping[int, tuple[dt.datetime, str]]:
        running = [job for card in cards for job in card.running]
        replayed = replay(jobs, cards, view.now, PlacementRule(view.charges, view.now, running))
        return {job_id: (found.started, found.node) for job_id, found in replayed.runs.items()}

    expected, late = run(list(view.cards.values())), run([_late(card, view) for card in view.cards.values()])
    return {
        job_id: Start(at=at, spread_s=max(0.0, (late[job_id][0] - at).total_seconds()), node=node)
        for job_id, (at, node) in expected.items()
        if job_id in late
    }


def _late(card: Card, view: FleetView) -> Card:
    """The card when everything takes as long as its measured spread allows."""

    def later(job_id: int) -> dt.timedelta:
        row = view.running.get(job_id)
        return dt.timedelta(seconds=(row.eta_spread_seconds or 0.0) if row is not None else 0.0)

    return replace(
        card,
        running=tuple(replace(j, ends=None if j.ends is None else j.ends + later(j.job_id)) for j in card.running),
    )


def ahead_of(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """Ready jobs that the rule tries before it and that could take a card which suits it."""
    me = waiting_of(vars(job), view.now)

    def before(other: Waiting) -> bool:
        if other.priority != me.priority:
            return other.priority > me.priority
        if other.user == me.user:
            return other.job_id < me.job_id
        theirs, mine = view.charges.get(other.user, 0.0), view.charges.get(me.user, 0.0)
        return theirs < mine or (theirs == mine and other.job_id < me.job_id)

    found = [o for o in rivals(job, view, waiting) if before(o)]
    return sorted(found, key=lambda o: (-o.priority, view.charges.get(o.user, 0.0), o.job_id))


def rivals(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """Other ready jobs that could take a card which suits this one."""
    me, largest = waiting_of(vars(job), view.now), largest_gpu(view.cards.values())

    def may_take(other: Waiting, card: Card) -> bool:
        return suits(card, other, largest) and _ever(other, card)

    cards = [card for card in view.cards.values() if card.open and may_take(me, card)]
    return [o for o in waiting if o.job_id != me.job_id and any(may_take(o, card) for card in cards)]


def with_start(wait: Wait, job: Job, view: FleetView, waiting: Sequence[Waiting], starts: Mapping[int, Start]) -> Wait:
    """The reason for one that waits for room, by the card on which it is expected to start.

    Where that hangs on jobs which go before it and whose length nobody knows, these are named.
    """
    if wait.word not in ("memory", "busy") or not view.running:
        return wait
    start = starts.get(job.job_id)
    if start is None:
        ahead = ahead_of(job, view, waiting)
        first = f"; {_goes_first([other.job_id for other in ahead])}" if ahead else ""
        return replace(wait, sentence=f"{wait.sentence}{first}")
    opening = _opening(waiting_of(vars(job), view.now), view.cards[start.node], view)
    if opening is None or not opening[1] or wait.sentence.startswith(f"{start.node} when"):
        return wait
    return replace(wait, sentence=f"{start.node} when {_end(opening[1])}")


def _goes_first(jobs: Sequence[int]) -> str:
    return f"{jobs[0]} goes first" if len(jobs) == 1 else f"{jobs[0]} and {len(jobs) - 1} more go first"


def would_start(
    job: Job, view: FleetView, waiting: Sequence[Waiting], need: Need, methods: tuple[Method, ...]
) -> str | None:
    """The card that would take the job now if it needed this; asked of the rule with everything else as it is."""
    from loractl.common.placement.lines import levels_of
    from loractl.common.placement.rule import place

    changed = replace(waiting_of(vars(job), view.now), need=need, methods=methods)
    others = [other for other in waiting if other.job_id != job.job_id]
    for decision in place(levels_of([*others, changed]), list(view.cards.values()), view.charges, view.now):
        if decision.placed is not None and decision.placed.job.job_id == job.job_id:
            return decision.placed.node
    return None


def without_others(job: Job, view: FleetView) -> tuple[str, str] | None:
    """(card, whose program) where the job would fit now if other people's programs were not there."""
    me = waiting_of(vars(job), view.now)
    for card in view.cards.values():
        if card.outside == 0 or _could_start(me, card, view):
            continue
        if _could_start(me, replace(card, outside=0), view) and view.nodes[card.node].outside:
            return card.node, _whose(view, card)
    return None


def _could_start(me: Waiting, card: Card, view: FleetView) -> bool:
    """Whether the card would take the job now, whoever is before it. One of unknown need gets a card of its own."""
    alone = me.least is not None or not card.running
    return card.open and alone and could_start(me, card, view.cards.values())


def _suits(job: Job, card: Card, view: FleetView) -> bool:
    """Whether the card may take the job, room aside: now, or once it has waited long enough for LoRA."""
    me, largest = waiting_of(vars(job), view.now), largest_gpu(view.cards.values())
    return any(suits(card, one, largest) for one in (me, _at_last(job, me)))


def _ever(me: Waiting, card: Card) -> bool:
    """Whether the card holds the job once everything else has left it."""
    least = me.least
    return least is None or least <= card.usable


def _silent_s(view: FleetView, node: str) -> float:
    return (view.now - view.nodes[node].seen_at).total_seconds()


def _holder(view: FleetView, card: Card, *, pid: bool = False) -> str:
    """Who holds how much of the card beside our jobs."""
    others = _others(view, card)
    if not others:
        return f"something outside loractl holds {gib(card.outside)}, or did lately"
    number = f" (pid {others[0]['pid']})" if pid and others[0].get("name") else ""
    more = f" and {len(others) - 1} more hold" if len(others) > 1 else " holds"
    return f"{process_name(others[0])}{number}{more} {gib(card.outside)}"


def _whose(view: FleetView, card: Card) -> str:
    """The largest of other people's programs on the card, by name."""
    others = _others(view, card)
    return process_name(others[0]) if others else "something outside loractl"


def _others(view: FleetView, card: Card) -> list[dict[str, Any]]:
    """Other people's processes on the card, the largest first."""
    return sorted(view.nodes[card.node].outside, key=lambda p: -(p.get("bytes") or 0))


def process_name(process: Mapping[str, object]) -> str:
    """A program of somebody else, for people."""
    name, user = process.get("name") or f"pid {process['pid']}", process.get("user")
    return f"{name} of {user}" if user else str(name)


def _end(jobs: Sequence[int]) -> str:
    """These jobs and what they do, like "3 and 1 end"."""
    more = f", {jobs[1]} and {len(jobs) - 2} more" if len(jobs) > 2 else f" and {jobs[1]}" if len(jobs) > 1 else ""
    return f"{jobs[0]}{more} {'ends' if len(jobs) == 1 else 'end'}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _clock(at: dt.datetime, now: dt.datetime) -> str:
    from loractl.scheduler.text.jobs import clock

    return clock(at, now)
