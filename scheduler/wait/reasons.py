"""Why a job waits, as a word and a sentence.

The first tier that applies gives the reason: it can never start; a rule or a wish holds it; the fleet has no card open
for it; the memory is taken. The placement rule itself says what it decides.
"""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loractl import __version__
from loractl.common.job.status import BLAMED, Status
from loractl.common.placement.cards import Card, Obstacle, could_start, least_limit
from loractl.common.placement.lines import Waiting
from loractl.common.placement.refusals import Taken, out_of_reach
from loractl.common.placement.shares import Allowance, window_name
from loractl.common.store.fleet import NODE_STALE_S, FleetView, avoided_by, fault_of, paused, unreadable
from loractl.common.units import clock, duration, gib, hours

from .cards import (
    SILENT_S,
    Asking,
    avoidance_of,
    holder,
    other_format,
    short_of_time,
    silent_s,
)
from .gangs import gang_wait, gathering_of, in_words, when_they_end

if TYPE_CHECKING:
    from loractl.common.store.tables import Job

AT_ONCE_S = 20.0
"""A job that the rule places and that has waited no longer than this will be taken in a moment."""


class Tier(enum.IntEnum):
    """The kinds of reasons; the first that applies is reported."""

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


def explain(job: Job, view: FleetView) -> Wait:
    """The reason for a QUEUED job."""
    if what := unreadable(vars(job)):
        sentence = f"its row can't be read, so a worker will set it aside: {what}"
        return _held_back(job, view) or Wait(tier=Tier.NEVER, word="never", sentence=sentence)
    asking = Asking.of(job, view)
    return (
        _never(job, asking.at_last, view)
        or _held_back(job, view)
        or _result_elsewhere(job, asking.me, view)
        or _no_open_card(asking, view)
        or _next(job, view)
        or _others_first(asking, view)
        or _patience(asking, view)
        or _avoids(asking, view)
        or _short_of_time(asking, view)
        or _room(asking, view)
    )


def _never(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    def never(sentence: str) -> Wait:
        return Wait(tier=Tier.NEVER, word="never", sentence=sentence)

    if not me.methods:
        resources = job.spec.get("resources")
        limit = resources.get("max_vram") if isinstance(resources, dict) else None
        size = f", {gib(limit)}," if isinstance(limit, int) else ""
        return never(f"its resources.max_vram{size} is less than it needs with any method")
    why = out_of_reach(me, view.cards.values())
    return None if why is None else never(why)


def _held_by(message: str | None) -> str:
    """Who or what holds it, to follow the word held."""
    return (message or "until loractl retry").removeprefix("held: ").removeprefix("held ")


def _held_back(job: Job, view: FleetView) -> Wait | None:
    """A person's wish, a pause after a failed attempt, or a limit."""
    if job.held and job.is_blocked:
        return Wait(tier=Tier.POLICY, word="after", sentence=_behind(job, view))
    if job.held:
        return Wait(tier=Tier.POLICY, word="held", sentence=_held_by(job.message))
    if job.not_before is not None and paused(job, view.now):
        pause = duration((job.not_before - view.now).total_seconds())
        if job.message is not None and job.reason is None:  # no attempt ended: a worker of an older version saw it
            return Wait(tier=Tier.POLICY, word="version", sentence=job.message)
        after = f": {_blamed(job, view)} failed it ({job.reason})" if job.reason in BLAMED else ""
        return Wait(tier=Tier.POLICY, word="retry", sentence=f"attempt {job.attempt + 1} in {pause}{after}")
    if (limit := view.round.limit_of(job.user)) is not None:
        sentence = f"{limit.user} runs {limit.runs}, the limit is {limit.most}"
        return Wait(tier=Tier.POLICY, word="limit", sentence=sentence)
    allowance = view.allowed.get(job.user)
    if allowance is not None and allowance.exceeded and not allowance.soft:
        return Wait(tier=Tier.POLICY, word="quota", sentence=_used_up(job.user, allowance, view.now))
    return None


def _used_up(user: str, allowance: Allowance, now: dt.datetime) -> str:
    """When ended work is below the quota again; unknown while running jobs alone exceed it."""
    quota = f"{allowance.card_hours:g} card hours a {window_name(allowance.window_s)}"
    used = f"{user} has used {hours(allowance.used)} of {quota}"
    return used + ("" if allowance.below_at is None else f"; jobs start again about {clock(allowance.below_at, now)}")


def _behind(job: Job, view: FleetView) -> str:
    """The job for which it waits, and that job's state: the first of a chain whose turn it is."""
    first = view.awaited.get(job.awaits or 0)
    if first is None:
        return f"job {job.awaits}, which was removed{_without_it(job)}"
    head, name = first, f"job {first.job_id} ({first.name})"
    while head.status is Status.QUEUED and head.is_blocked and (before := view.awaited.get(_earlier(head))) is not None:
        head = before
    said = "" if head is first else f", which waits for job {head.job_id} ({head.name})"
    return f"{name}{said}, {_how_far(head, view, any_end=head is first and job.after_any)}"


def _without_it(job: Job) -> str:
    """What helps once the job that it waits for is no longer there."""
    from loractl.common.job.ancestor import may_go_without

    if may_go_without(job.spec, job.awaits):
        return f": loractl edit {job.job_id} --set after=[] lets it start anyway"
    return f" with the adapter that it begins from: loractl cancel {job.job_id} drops it"


def _earlier(job: Job) -> int:
    """The job for which it waits; 0 if that is none of the earlier ones: by hand, a row may await itself."""
    return job.awaits if job.awaits is not None and job.awaits < job.job_id else 0


def _how_far(job: Job, view: FleetView, *, any_end: bool) -> str:
    if job.status is Status.QUEUED:
        return "which is held" if job.held else "which waits for a card"
    if job.status is Status.RUNNING:
        ends = None if job.eta_seconds is None else view.now + dt.timedelta(seconds=job.eta_seconds)
        return f"which runs on {job.node}" + ("" if ends is None else f" until about {clock(ends, view.now)}")
    if any_end or job.status is Status.SUCCEEDED:
        return f"which {job.status.in_words}: it starts in a moment"
    return f"which {job.status.in_words}: it starts once a retry of that job succeeds"


def _blamed(job: Job, view: FleetView) -> str | None:
    """The card or the box blamed for its last failure: with several cards, not always the first."""
    found = {name: why for name, why in avoided_by(job.avoids, view.now).items() if why.reason == job.reason}
    return max(found, key=lambda name: found[name].until, default=job.node)


def _result_elsewhere(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    """Its finished result is on a box that can't take it at this moment."""
    if me.only_host is None or job.result_until is None or _next(job, view) is not None:
        return None
    cards = [card for card in view.cards.values() if card.host == me.only_host]
    order = next((order for card in cards if (order := view.drain_of(card.node)) is not None), None)
    silent = min((silent_s(view, card.node) for card in cards), default=None)
    if silent is None:
        state = "no worker now"
    elif silent > NODE_STALE_S:
        state = f"last seen {duration(silent)} ago"
    elif order is not None:
        state = f"drained by {order.user}"
    else:
        state = "busy now" if any(card.open for card in cards) else "its worker is being stopped"
    until = clock(job.result_until, view.now)
    text = f"only {me.only_host} ({state}) may take it until {until}: it has the finished result"
    return Wait(tier=Tier.POLICY, word="result", sentence=text)


TOO_SMALL = (Obstacle.LABELS, Obstacle.METHODS, Obstacle.SMALL)
TOO_FEW = (Obstacle.UNSHARED, Obstacle.TOO_FEW, Obstacle.TOO_FEW_NOW)
NOT_OPEN = (*TOO_FEW, Obstacle.RESULT, Obstacle.CLOSED, Obstacle.PROCESSOR)


def _no_open_card(asking: Asking, view: FleetView) -> Wait | None:
    """No open card could ever hold it, though a closed one could."""
    refusals = {node: refusal for node, refusal in asking.refusals.items() if refusal not in TOO_SMALL}
    shared = view.round.gang_of(asking.at_last) is not None
    if shared or any(refusal not in NOT_OPEN for refusal in refusals.values()):
        return None
    if not refusals:
        return _fleet("worker", "no worker is online: start loractl worker on a box")
    holding = [view.cards[node] for node in refusals]
    online = [card for card in holding if silent_s(view, card.node) <= NODE_STALE_S]
    for card in online:
        order = view.drain_of(card.node)
        if order is not None:
            until = f" until {clock(order.until, view.now)}" if order.until else ""
            return _fleet("drained", f"{card.node} by {order.user}{until}: {order.reason}")
    for card in online:
        if (fault := fault_of(view.nodes[card.node])) is not None:
            return _fleet("closed", f"{card.node}: {fault}")
    if any(refusal in TOO_FEW for refusal in refusals.values()):
        few = "it needs several cards of one box, but too few are open"
        held = all(card.open for card in holding) and any(_is_held(asking, card) for card in holding)
        return None if held else _fleet("worker", few)
    if (left_out := next((card for card in online if card.open), None)) is not None:
        what = "a processor, which takes only jobs that no GPU can hold; no GPU with the job's labels is online"
        return _fleet("worker", f"{left_out.node} is {what}")
    if online:
        return _fleet("stopping", f"the worker of {online[0].node} is being stopped")
    return _all_silent(holding, view)


def _all_silent(cards: list[Card], view: FleetView) -> Wait:
    """The card seen last, and its worker's version if that explains the silence."""
    best = min(cards, key=lambda card: silent_s(view, card.node))
    theirs = view.nodes[best.node].versions.get("loractl", __version__)
    if _minor(theirs) != _minor(__version__):
        return _fleet("version", f"{best.node} ran loractl {theirs}, this is {__version__}: upgrade its worker")
    return _fleet("offline", f"{best.node} was last seen {duration(silent_s(view, best.node))} ago")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _fleet(word: str, sentence: str) -> Wait:
    return Wait(tier=Tier.FLEET, word=word, sentence=sentence)


def _next(job: Job, view: FleetView) -> Wait | None:
    """The rule gives it a card at this moment."""
    placed = view.round.placed.get(job.job_id)
    if placed is None:
        return None
    node = max((share.node for share in placed.shares), key=lambda name: silent_s(view, name))
    if (silent := silent_s(view, node)) > SILENT_S:
        return _fleet("offline", f"{node} would take it, but has been silent for {duration(silent)}")
    age = (view.now - job.submitted_at).total_seconds()
    late = "" if age <= AT_ONCE_S else f", waiting {duration(age)}"
    nodes = in_words([share.node for share in placed.shares])
    return Wait(
        tier=Tier.NEXT, word="next", sentence=f"{nodes} {'are' if placed.beside else 'is'} about to take it{late}"
    )


def _others_first(asking: Asking, view: FleetView) -> Wait | None:
    """A card, or each of several, has room for it, and the rule gives or keeps one of these for another job."""
    me, nodes = asking.me, list(asking.refusals)
    if asking.gang is not None:
        found = gathering_of(me, asking.gang, view)
        if found is None or any(room.after for _, room in found.rooms):
            return None
        nodes = [card.node for card, _ in found.rooms]
    own = next((placed for placed in view.round.placed.values() if placed.job.user == me.user), None)
    if own is not None and asking.gang is None and None in asking.refusals.values():
        # it has a card with room, but the rule passed it over
        most = least_limit(view.cards.values())
        text = f"job {own.job.job_id} goes first on {own.node}, and {me.user} may run {most} at a time"
        return _capacity("limit", text)
    kept, kept_for = list[str](), 0
    for node in nodes:
        taken = asking.refusals[node]
        if not isinstance(taken, Taken):
            continue
        if taken.given:
            return _passed_over(me, taken.given[-1], node)
        if taken.kept_for is not None and taken.kept_for.job_id != me.job_id:
            kept, kept_for = sorted([*kept, node]), taken.kept_for.job_id
            if asking.gang is None:
                break
    are = "are" if len(kept) > 1 else "is"
    return _capacity("kept", f"{in_words(kept)} {are} kept for job {kept_for}, which goes first") if kept else None


def _passed_over(me: Waiting, first: Waiting, node: str) -> Wait:
    if first.priority > me.priority:
        return _capacity("order", f"job {first.job_id} goes first on {node}: its priority is higher")
    if first.user != me.user and first.job_id > me.job_id:
        return _capacity("share", f"job {first.job_id} goes first on {node}: {first.user} has used the cards less")
    return _capacity("order", f"job {first.job_id} goes first on {node}")


def _patience(asking: Asking, view: FleetView) -> Wait | None:
    """It waits for a card that holds LoRA, though QLoRA could start."""
    until, cards = asking.job.lora_until, view.cards.values()
    if until is None or until <= view.now:
        return None
    small = next((card for card in cards if could_start(asking.at_last, card, cards)), None)
    if small is not None:
        text = f"it waits for LoRA until {clock(until, view.now)}; QLoRA would fit on {small.node} now"
        return _capacity("patience", text)
    if not asking.full:
        text = f"it waits for LoRA until {clock(until, view.now)}, but no card has room; then it may use QLoRA"
        return _capacity("patience", text)
    return None


def _avoids(asking: Asking, view: FleetView) -> Wait | None:
    """A card has room for it but failed it, or computes in another number format: it waits for another card."""
    forgets, cards = replace(asking.me, avoids=frozenset(), bf16=None), view.cards
    for node, refusal in asking.refusals.items():
        if refusal not in (Obstacle.AVOIDED, Obstacle.FORMAT) or not could_start(forgets, cards[node], cards.values()):
            continue
        if refusal is Obstacle.FORMAT:
            return _capacity("format", f"{node} {other_format(asking.me)}, so it waits for another card")
        why = avoidance_of(asking.job, cards[node], view)
        until = clock(why.until, view.now)
        return _capacity("avoids", f"{node} failed it ({why.reason}), so it waits for another card until {until}")
    return None


def _short_of_time(asking: Asking, view: FleetView) -> Wait | None:
    """The cards that could hold it stop before it could store a checkpoint there."""
    short = [view.cards[node] for node, refusal in asking.refusals.items() if refusal is Obstacle.TIME]
    if not short or asking.full or any(not isinstance(refusal, Obstacle) for refusal in asking.refusals.values()):
        return None
    card = max(short, key=lambda card: card.left_s or 0.0)
    return _capacity("time", f"{card.node} {short_of_time(asking.me, card, view)}")


def _room(asking: Asking, view: FleetView) -> Wait:
    """The card that has room first, and the jobs that must end for it. Without such a card: who holds the largest
    card."""
    me, full, kept = asking.me, asking.full, view.round.kept
    mine = kept if kept is not None and kept.job.job_id == me.job_id else None
    ours = " (kept for it)" if mine is not None else ""
    if asking.gang is not None:
        word, sentence = gang_wait(me, asking.gang, view)
        return _capacity(word, sentence + ours)
    if not full:
        free = next((node for node, refusal in asking.refusals.items() if refusal is None), None)
        missed = f"{free} has room for it, but the rule does not reach it"
        return _held_by_others(asking, view) if free is None else _capacity("order", missed)
    first = min(full, key=lambda name: (*full[name].rank, name))
    node = mine.node if mine is not None and mine.node in full else first
    word = "busy" if full[node].only_slot else "memory"
    return _capacity(word, f"{node} when {when_they_end(full[node].after)}{ours}")


def _held_by_others(asking: Asking, view: FleetView) -> Wait:
    blocked = [card for card in view.cards.values() if _is_held(asking, card)]
    if not blocked:
        return _capacity("memory", "no open card has room for it")
    card = max(blocked, key=lambda card: card.capacity)
    left = f"on {card.node}, which leaves {gib(card.capacity)} GiB"
    return _capacity("memory", f"{holder(view, card, pid=True)} {left}")


def _is_held(asking: Asking, card: Card) -> bool:
    refusal, could_hold = asking.refusals[card.node], (asking.me.bound or 0) <= card.usable
    programs = refusal is Obstacle.PROGRAMS or (refusal is Obstacle.TOO_FEW_NOW and card.outside > 0)
    return could_hold and programs


def _capacity(word: str, sentence: str) -> Wait:
    return Wait(tier=Tier.CAPACITY, word=word, sentence=sentence)
