"""Why a job waits, as a word and a sentence.

The first tier that applies gives the reason: it can never start; a rule or a wish holds it; the fleet has no card open
for it; the memory is taken. The placement rule itself says what it decides.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loractl import __version__
from loractl.common.job.need import SharedNeed
from loractl.common.job.status import BLAMED
from loractl.common.placement.cards import Card, least_limit, suits
from loractl.common.placement.lines import Waiting
from loractl.common.placement.reach import out_of_reach
from loractl.common.store.fleet import NODE_STALE_S, FleetView, avoided_by, fault_of, unreadable, waiting_of
from loractl.common.units import clock, duration, gib

from .cards import (
    SILENT_S,
    at_last,
    avoidance_of,
    beside,
    could_ever_hold,
    could_start_now,
    holder,
    opening_of,
    refused_join,
    silent_s,
    still_inside,
    suits_at_last,
    when_they_end,
)
from .gangs import gang_wait, gathering_of, in_words, shared_way

if TYPE_CHECKING:
    from loractl.common.store.tables import Job

AT_ONCE_S = 20.0
"""A job that the rule places and that has waited no longer than this will be taken in a moment."""


class Tier(enum.IntEnum):
    """The kinds of reasons; the first that applies is told."""

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
    apart: str = ""  # of the sentence: why the job does not train beside those that have its base

    @property
    def brief(self) -> str:
        """The sentence for a list of jobs: `loractl why` alone tells what keeps a job apart."""
        return self.sentence.replace(self.apart, "", 1)

    def __str__(self) -> str:
        return f"{self.word}: {self.brief}"


def explain(job: Job, view: FleetView) -> Wait:
    """The reason for a QUEUED job."""
    if what := unreadable(vars(job)):
        sentence = f"its row can't be read, a worker sets it aside: {what}"
        return _held_back(job, view) or Wait(tier=Tier.NEVER, word="never", sentence=sentence)
    me = waiting_of(vars(job), view.now)
    whole = at_last(job, me)
    return (
        _never(job, whole, view)
        or _held_back(job, view)
        or _result_elsewhere(job, me, view)
        or _no_open_card(job, whole, view)
        or _next(job, view)
        or _others_first(job, me, view)
        or _patience(job, me, view)
        or _avoids(job, me, view)
        or _room(job, me, view)
    )


def _never(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    def never(sentence: str) -> Wait:
        return Wait(tier=Tier.NEVER, word="never", sentence=sentence)

    if not me.methods:
        resources = job.spec.get("resources")
        limit = resources.get("max_vram") if isinstance(resources, dict) else None
        size = f", {gib(limit)}," if isinstance(limit, int) else ""
        return never(f"its resources.max_vram{size} is below every need")
    why = out_of_reach(me, view.cards.values())
    return None if why is None else never(why)


def _held_by(message: str | None) -> str:
    """Who or what holds it; the word held stands before it."""
    return (message or "until loractl retry").removeprefix("held: ").removeprefix("held ")


def _held_back(job: Job, view: FleetView) -> Wait | None:
    """A person's wish, a pause after a failed attempt, or a limit."""
    if job.held:
        return Wait(tier=Tier.POLICY, word="held", sentence=_held_by(job.message))
    if job.not_before is not None and job.not_before > view.now:
        pause = duration((job.not_before - view.now).total_seconds())
        if job.message is not None and job.reason is None:  # no attempt ended: a worker of an older version saw it
            return Wait(tier=Tier.POLICY, word="version", sentence=job.message)
        after = f": {_blamed(job, view)} failed it ({job.reason})" if job.reason in BLAMED else ""
        return Wait(tier=Tier.POLICY, word="retry", sentence=f"attempt {job.attempt + 1} in {pause}{after}")
    limit, mine = least_limit(view.cards.values()), sum(running.user == job.user for running in view.running.values())
    if limit is not None and mine >= limit:
        return Wait(tier=Tier.POLICY, word="limit", sentence=f"{job.user} runs {mine}, the limit is {limit}")
    return None


def _blamed(job: Job, view: FleetView) -> str | None:
    """The card or the box that its last failure is put down to: of several cards not always the first."""
    found = {name: why for name, why in avoided_by(job.avoids, view.now).items() if why.reason == job.reason}
    return max(found, key=lambda name: found[name].until, default=job.node)


def _result_elsewhere(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    """Its finished result lies on a box that can't take it at this moment."""
    if me.only_host is None or job.result_until is None or _next(job, view) is not None:
        return None
    cards = [card for card in view.cards.values() if card.host == me.only_host]
    order = next((order for card in cards if (order := view.drain_of(card.node)) is not None), None)
    silent = min((silent_s(view, card.node) for card in cards), default=None)
    if silent is None:
        state = "which has no worker now"
    elif silent > NODE_STALE_S:
        state = f"last seen {duration(silent)} ago"
    elif order is not None:
        state = f"drained by {order.user}"
    else:
        state = "busy now" if any(card.open for card in cards) else "whose worker is being stopped"
    text = f"{me.only_host}, {state}, has its finished result and alone may take it until "
    return Wait(tier=Tier.POLICY, word="result", sentence=text + clock(job.result_until, view.now))


def _no_open_card(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    """No open card could ever hold it, though a closed one could."""
    if shared_way(me, view) is not None:
        return None
    labelled = [card for card in view.cards.values() if me.requires <= card.labels]
    holding = [card for card in labelled if could_ever_hold(me, card) or not card.total]
    if any(card.open and suits_at_last(job, card, view) for card in holding):
        return None
    if not holding:
        return _fleet("worker", "no worker is online: start loractl worker on a box")
    online = [card for card in holding if silent_s(view, card.node) <= NODE_STALE_S]
    for card in online:
        order = view.drain_of(card.node)
        if order is not None:
            until = f" until {clock(order.until, view.now)}" if order.until else ""
            return _fleet("drained", f"{card.node} by {order.user}{until}: {order.reason}")
    for card in online:
        if (fault := fault_of(view.nodes[card.node])) is not None:
            return _fleet("closed", f"{card.node}: {fault}")
    left_out = next((card for card in online if card.open), None)
    if left_out is not None and not me.alone:
        return _fleet("worker", "it asks for several cards of one box, and not enough are open")
    if left_out is not None:
        what = "a processor, for what no GPU of the fleet can hold; no GPU with its labels is online"
        return _fleet("worker", f"{left_out.node} is {what}")
    if online:
        return _fleet("stopping", f"the worker of {online[0].node} is being stopped")
    return _all_silent(holding, view)


def _all_silent(cards: list[Card], view: FleetView) -> Wait:
    """The card that was seen last, and its worker's version if that explains the silence."""
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
    placed = next((d.placed for d in view.decisions if d.placed and d.placed.job.job_id == job.job_id), None)
    if placed is None:
        return None
    node = max((share.node for share in placed.shares), key=lambda name: silent_s(view, name))
    if (silent := silent_s(view, node)) > SILENT_S:
        return _fleet("offline", f"{node} would take it and has been silent for {duration(silent)}")
    age = (view.now - job.submitted_at).total_seconds()
    late = "" if age <= AT_ONCE_S else f", waiting {duration(age)}"
    if placed.join is not None:
        late = f" {beside(other.job_id for other in view.cards[node].inside(placed.join.base))}{late}"
    nodes = in_words([share.node for share in placed.shares])
    return Wait(
        tier=Tier.NEXT, word="next", sentence=f"{nodes} {'are' if placed.beside else 'is'} about to take it{late}"
    )


def _others_first(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    """A card has room for it, or each of several has, and the rule gives or keeps one of these for another job."""
    if (gang := shared_way(me, view)) is not None:
        return _others_first_on_several(job, me, gang, view)
    taken = {s.node: d.placed.job for d in view.decisions if d.placed is not None for s in d.placed.shares}
    kept_nodes, kept_for = _kept(view)
    startable = [card for card in view.cards.values() if could_start_now(me, card, view)]
    own = next((d.placed for d in view.decisions if d.placed is not None and d.placed.job.user == me.user), None)
    if own is not None and any(card.node not in taken and card.node not in kept_nodes for card in startable):
        # it has a card with room, but the rule passed it over
        most = least_limit(view.cards.values())
        text = f"{own.job.job_id} goes first on {own.node}, and {me.user} may run {most} at a time"
        return _capacity("limit", text)
    for card in startable:
        if card.node in taken:
            return _passed_over(me, taken[card.node], card.node)
        if card.node in kept_nodes and kept_for != job.job_id:
            return _capacity("kept", f"{card.node} is kept for {kept_for}, which goes first")
    return None


def _others_first_on_several(job: Job, me: Waiting, gang: SharedNeed, view: FleetView) -> Wait | None:
    found = gathering_of(me, gang, view)
    if found is None or any(room.after for _, room in found.rooms):
        return None
    nodes = [card.node for card, _ in found.rooms]
    taken = {s.node: d.placed.job for d in view.decisions if d.placed is not None for s in d.placed.shares}
    if (node := next((node for node in nodes if node in taken), None)) is not None:
        return _passed_over(me, taken[node], node)
    kept_nodes, kept_for = _kept(view)
    kept = sorted(node for node in nodes if node in kept_nodes and kept_for != job.job_id)
    are = "are" if len(kept) > 1 else "is"
    return _capacity("kept", f"{in_words(kept)} {are} kept for {kept_for}, which goes first") if kept else None


def _kept(view: FleetView) -> tuple[list[str], int | None]:
    """The cards that the rule keeps, and the job for which it does."""
    kept = next((d.reserved for d in view.decisions if d.reserved is not None), None)
    return ([], None) if kept is None else ([card.node for card in kept.cards], kept.job.job_id)


def _passed_over(me: Waiting, first: Waiting, node: str) -> Wait:
    if first.priority > me.priority:
        return _capacity("order", f"{first.job_id} has a higher priority on {node}")
    if first.user != me.user and first.job_id > me.job_id:
        return _capacity("share", f"{first.user} used the cards less: {first.job_id} goes first on {node}")
    return _capacity("order", f"{first.job_id} goes first on {node}")


def _patience(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    """It waits for a card that holds LoRA, though QLoRA could start."""
    if job.lora_until is None or job.lora_until <= view.now:
        return None
    until, whole = clock(job.lora_until, view.now), at_last(job, me)
    small = next((card for card in view.cards.values() if could_start_now(whole, card, view)), None)
    if small is not None:
        return _capacity("patience", f"until {until} for LoRA; QLoRA would fit on {small.node} now")
    if all(opening_of(me, card, view) is None for card in view.cards.values()):
        return _capacity("patience", f"until {until} for LoRA, for which no card has room; then for QLoRA")
    return None


def _avoids(job: Job, me: Waiting, view: FleetView) -> Wait | None:
    """A card has room for it and failed it: it waits for another one."""
    forgets, cards = replace(me, avoids=frozenset()), view.cards.values()
    for card in cards:
        if card.open and not could_start_now(me, card, view) and could_start_now(forgets, card, view):
            why = avoidance_of(job, card, view)
            until = clock(why.until, view.now)
            return _capacity("avoids", f"{card.node} failed it ({why.reason}): until {until} for another card")
    return None


def _room(job: Job, me: Waiting, view: FleetView) -> Wait:
    """The card that has room first, and the jobs that must end for it. Without one: who holds the largest card."""
    kept_nodes, kept_for = _kept(view)
    mine = kept_for == job.job_id
    if (gang := shared_way(me, view)) is not None:
        wait = gang_wait(me, gang, view)
        ends = f" when {when_they_end(wait.after)}" if wait.after else ""
        word = "busy" if wait.only_slot else "memory"
        return _capacity(word, f"{wait.sentence}{ends}{' (kept for it)' if mine else ''}")
    openings = {
        card.node: opening for card in view.cards.values() if (opening := opening_of(me, card, view)) is not None
    }
    if not openings:
        return _held_by_others(me, view)
    first = min(openings, key=lambda name: (*openings[name].rank, name))
    node = kept_nodes[0] if mine and kept_nodes[0] in openings else first
    opening = openings[node]
    sentence = f"{node} when {when_they_end(opening.after)}{' (kept for it)' if mine else ''}"
    apart = refused_join(me, view.cards[node], view)
    word = "busy" if opening.only_slot else "memory"
    return Wait(tier=Tier.CAPACITY, word=word, sentence=sentence + apart, apart=apart)


def _held_by_others(me: Waiting, view: FleetView) -> Wait:
    largest = view.largest
    cards = [c for c in view.cards.values() if c.open and suits(c, me, largest) and could_ever_hold(me, c)]
    if not cards:
        return _capacity("memory", "no open card has room for it")
    blocked = max(cards, key=lambda card: card.capacity)
    if still := still_inside(me, blocked):
        return _capacity("memory", f"on {blocked.node} {still}")
    held = holder(view, blocked, pid=True)
    return _capacity("memory", f"{held} on {blocked.node}, {gib(blocked.capacity)} are left")


def _capacity(word: str, sentence: str) -> Wait:
    return Wait(tier=Tier.CAPACITY, word=word, sentence=sentence)
