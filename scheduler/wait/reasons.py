"""Why a job waits: a word, a sentence, when that ends, and the command that helps.

The first that applies gives the reason: it can never start; a rule or a wish holds it; else the card that comes first
says it.
"""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass

from loractl.common.job.method import Method, SharedNeed, least_need
from loractl.common.job.status import BLAMED, Status
from loractl.common.placement.cards import could_start, least_limit
from loractl.common.placement.gangs import first_gathering, takers
from loractl.common.placement.refusals import most_usable, out_of_reach, with_labels
from loractl.common.placement.rule import jobs_by_user
from loractl.common.placement.shares import Allowance, window_name
from loractl.common.store.fleet import FleetView, avoided_by, paused
from loractl.common.store.tables import Job
from loractl.common.text import in_words, when_they_end
from loractl.common.units import clock, duration, gib, hours

from .cards import KEPT, SILENT_S, Asking, Chance, silent_s
from .sooner import change_of

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
    ends: dt.datetime | None = None  # when this is over; None: that is not known, or its expected start says it
    helps: str = ""  # what the command does, in a few words
    command: str = ""  # the one that helps; empty: waiting does

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}"


def explain(job: Job, view: FleetView) -> Wait:
    """The reason for a QUEUED job."""
    asking = Asking.of(job, view)
    return _never(asking) or _held_back(job, view) or _next(asking) or _of_cards(asking)


def _never(asking: Asking) -> Wait | None:
    job, me, cards = asking.job, asking.at_last, asking.view.cards.values()
    edit, labelled = f"loractl edit {job.job_id} --set", with_labels(cards, me.requires)
    most = most_usable(labelled) if labelled else None
    helps, command = "What would fit", f"loractl plan {job.job_id} --solve"
    why = out_of_reach(me, cards)
    if not me.methods:
        limit = (job.spec.get("resources") or {}).get("max_vram")
        why = f"its resources.max_vram, {gib(limit)}, is less than it needs with any method"
        helps, command = "Without that limit", f"{edit} resources.max_vram=null"
    elif why is None:
        return None
    elif not labelled:
        helps, command = "On any box", f"{edit} 'resources.node_labels={{}}'"
    elif most is not None and me.least is not None and me.least <= most:
        helps, command = "On one card", f"{edit} resources.cards=1"
        if me.alone:
            steps = max(1, job.spec["training"]["save_steps"] // 2)
            helps, command = "With its first checkpoint sooner", f"{edit} training.save_steps={steps}"
    elif most is not None and Method.QLORA not in me.methods and job.vram_qlora and job.vram_qlora <= most:
        helps = f"It could start with {gib(job.vram_qlora)} GiB as QLoRA"
        command = f"{change_of(job)} --set method=qlora"
        if job.checkpoint is not None:
            why += f"; it goes on from its checkpoint of step {job.checkpoint['step']} with {me.methods[0]} alone"
            helps = f"From step 0, with {gib(job.vram_qlora)} GiB as QLoRA"
    return Wait(tier=Tier.NEVER, word="never", sentence=why, helps=helps, command=command)


def _held_back(job: Job, view: FleetView) -> Wait | None:
    """A person's wish, a pause after a failed attempt, or a limit."""

    def policy(word: str, sentence: str, ends: dt.datetime | None = None, helps: str = "", command: str = "") -> Wait:
        return Wait(tier=Tier.POLICY, word=word, sentence=sentence, ends=ends, helps=helps, command=command)

    if job.is_blocked:
        return policy("after", *_behind(job, view))
    if job.held:
        by = (job.message or "until loractl release").removeprefix("held: ").removeprefix("held ")
        return policy("held", by, None, "Release it", f"loractl release {job.job_id}")
    if job.not_before is not None and paused(job, view.now):
        if job.message is not None and job.reason is None:  # no attempt ended: a worker of an older version saw it
            return policy("version", job.message, job.not_before)
        pause = duration((job.not_before - view.now).total_seconds())
        after = f": {_blamed(job, view)} failed it ({job.reason})" if job.reason in BLAMED else ""
        sentence = f"attempt {job.attempt + 1} in {pause}{after}"
        return policy("retry", sentence, job.not_before, "What happened", f"loractl status {job.job_id}")
    cards = view.cards.values()
    most, runs = least_limit(cards), jobs_by_user(cards).get(job.user, 0)
    if most is not None and runs >= most:
        jobs = "1 job" if runs == 1 else f"{runs} jobs"
        sentence = f"{job.user} runs {jobs}, and one person may run {most} at a time"
        return policy("limit", sentence, None, "These jobs", f"loractl status --user {job.user}")
    allowance = view.allowed.get(job.user)
    if allowance is not None and allowance.exceeded and not allowance.soft:
        return policy("quota", _used_up(allowance, view.now), allowance.below_at)
    return None


def _used_up(allowance: Allowance, now: dt.datetime) -> str:
    """When ended work is below the quota again; unknown while running jobs alone exceed it."""
    quota = f"{allowance.card_hours:g} card hours a {window_name(allowance.window_s)}"
    used = f"{allowance.user} has used {hours(allowance.used)} of {quota}"
    return used + ("" if allowance.below_at is None else f"; jobs start again about {clock(allowance.below_at, now)}")


def _blamed(job: Job, view: FleetView) -> str | None:
    """The card or the box blamed for its last failure: with several cards, not always the first."""
    found = {name: why for name, why in avoided_by(job.avoids, view.now).items() if why.reason == job.reason}
    return max(found, key=lambda name: found[name].until, default=job.node)


def _behind(job: Job, view: FleetView) -> tuple[str, dt.datetime | None, str, str]:
    """The job for which it waits, and how far the first of that chain is: a sentence, when that ends, what helps."""
    from loractl.common.job.ancestor import may_go_without

    without = "Start without", f"loractl edit {job.job_id} --set after=[]"
    if not may_go_without(job.spec, job.awaits):
        without = "", ""
    first = view.awaited.get(job.awaits or 0)
    if first is None:
        if not without[1]:
            without = "It can't begin without that adapter. Drop it", f"loractl cancel {job.job_id}"
        return f"job {job.awaits}, which was removed", None, *without
    head, sentence = first, f"job {first.job_id} ({first.name})"
    while head.status is Status.QUEUED and head.is_blocked and (before := view.awaited.get(_earlier(head))) is not None:
        head = before
    if head is not first:
        sentence += f", which waits for job {head.job_id} ({head.name})"
    ends = None
    if head.status is Status.QUEUED:
        far = "is held" if head.held or head.is_blocked else "waits for a card"
    elif head.status is Status.RUNNING:
        ends = None if head.eta_seconds is None else view.now + dt.timedelta(seconds=head.eta_seconds)
        far = f"runs on {head.node}" + ("" if ends is None else f" until about {clock(ends, view.now)}")
    elif head.status is Status.SUCCEEDED or (head is first and job.after_any):
        far = f"{head.status.in_words}: it starts in a moment"
    else:
        far = f"{head.status.in_words}: it starts once a retry of that job succeeds"
    if first.status.is_terminal and first.status is not Status.SUCCEEDED and not job.after_any:
        return f"{sentence}, which {far}", ends, "Queue that one again", f"loractl retry {job.awaits}"
    return f"{sentence}, which {far}", ends if head is first else None, *without


def _earlier(job: Job) -> int:
    """The job for which it waits; 0 if that is none of the earlier ones: by hand, a row may await itself."""
    return job.awaits if job.awaits is not None and job.awaits < job.job_id else 0


def _next(asking: Asking) -> Wait | None:
    """The rule gives it a card at this moment."""
    job, view = asking.job, asking.view
    placed = view.placed.get(job.job_id)
    if placed is None:
        return None
    nodes = [share.node for share in placed.shares]
    node = max(nodes, key=lambda name: silent_s(view, name))
    if (silent := silent_s(view, node)) > SILENT_S:
        sentence = f"{node} would take it, but has been silent for {duration(silent)}"
        return Wait(tier=Tier.FLEET, word="offline", sentence=sentence)
    age = (view.now - job.waits_from).total_seconds()
    late = "" if age <= AT_ONCE_S else f", waiting {duration(age)}"
    are = "is" if len(nodes) == 1 else "are"
    sentence = f"{in_words(nodes)} {are} about to take it{late}"
    return Wait(tier=Tier.NEXT, word="next", sentence=sentence, ends=view.now)


def _of_cards(asking: Asking) -> Wait:
    """What the card says that comes first."""
    job, me, view, offers = asking.job, asking.me, asking.view, asking.offers

    def order(node: str) -> tuple[Chance, bool, dt.datetime, float, str]:
        said, card = offers[node], view.cards[node]
        tie = {Chance.OFFLINE: silent_s(view, node), Chance.PROGRAMS: -card.capacity, Chance.TIME: -(card.left_s or 0)}
        return said.chance, said.at is None, said.at or view.now, tie.get(said.chance, 0), node

    node = min((node for node, said in offers.items() if said.chance is not Chance.NEVER), key=order, default=None)
    if node is None:
        sentence = "no worker is online: start loractl worker on a box"
        return Wait(tier=Tier.FLEET, word="worker", sentence=sentence, helps="On a box", command="loractl worker")
    said = offers[node]
    tier = Tier.FLEET if said.chance >= Chance.DRAINED else Tier.CAPACITY
    word, sentence, ends, helps, command = said.word, f"{node} {said.text}", said.at, "", ""
    if said.chance is Chance.DRAINED and (order_ := view.drain_of(node)) is not None:
        helps, command = f"If {order_.user} agrees", f"loractl undrain {order_.target}"
    elif said.word in ("stopping", "offline"):
        helps, command = f"On {view.cards[node].host}", "loractl worker"
    if asking.gang is not None and said.chance < Chance.DRAINED:
        word, sentence, ends = _several(asking, asking.gang)
    elif said.chance is Chance.FREE and said.word == "order":
        own = next((placed for placed in view.placed.values() if placed.job.user == me.user), None)
        word, sentence = "order", f"{node} has room for it, but the rule does not reach it"
        if own is not None:
            most = least_limit(view.cards.values())
            word = "limit"
            sentence = f"job {own.job.job_id} goes first on {own.node}, and one person may run {most} at a time"
    elif job.lora_until is not None and job.lora_until > view.now and Chance.TAKEN < said.chance < Chance.DRAINED:
        until, cards = clock(job.lora_until, view.now), view.cards.values()
        small = next((card for card in cards if could_start(asking.at_last, card, cards)), None)
        if small is not None or said.chance > Chance.FULL:
            qlora = "no card has room; then it may use QLoRA" if small is None else f"QLoRA would fit on {small.node}"
            word, sentence, ends = "patience", f"it waits for LoRA until {until}, but {qlora}", job.lora_until
            helps, command = "Without waiting", f"loractl edit {job.job_id} --set lora_patience=0s"
    if me.only_host is not None and job.result_until is not None:
        until = clock(job.result_until, view.now)
        where = sentence if view.cards[node].host == me.only_host else "it has no worker now"
        sentence = f"only {me.only_host}, which has its finished result, may take it until {until}; {where}"
        tier, word, ends = Tier.POLICY, "result", job.result_until
    return Wait(tier=tier, word=word, sentence=sentence, ends=ends, helps=helps, command=command)


ORDINALS = {2: "second", 3: "third", 4: "fourth"}


def _several(asking: Asking, gang: SharedNeed) -> tuple[str, str, dt.datetime | None]:
    """What a job on several cards waits for, as a word and a sentence: a second card of 20 GiB on heron when job 12
    ends. And when that is."""
    me, view, offers = asking.me, asking.view, asking.offers
    size = least_need(me.methods, gang.need)
    of_size = "" if size is None else f" of {gib(size)} GiB"
    found = first_gathering(me, gang, takers(me, gang, view.cards.values()), view.now)
    if found is None:
        return "memory", f"waits for {gang.cards} cards{of_size} of one box", None
    rooms = found[1].rooms
    taken = [(card.node, offers[card.node]) for card, _ in rooms if offers[card.node].chance is Chance.TAKEN]
    full = [(card, room) for card, room in rooms if room.after]
    if taken and not full:
        said = taken[0][1]
        nodes = [node for node, other in taken if other == said]
        text = said.text.replace("is ", "are ", 1) if len(nodes) > 1 else said.text
        return said.word, f"{in_words(nodes)} {text}", None
    after = tuple(dict.fromkeys(job.job_id for _, room in full for job in room.after))
    second = len(full) == 1 and gang.cards in ORDINALS
    more = "more " if len(full) < gang.cards else ""
    wanted = f"a {ORDINALS[gang.cards]} card" if second else f"{len(full) or gang.cards} {more}cards"
    ends = f" when {when_they_end(after)}" if after else ""
    ours = KEPT if any(offers[card.node].chance is Chance.KEPT for card, _ in rooms) else ""
    only_slot = size is not None and all(card.free >= size for card, _ in full)
    word = "busy" if only_slot else "memory"
    return word, f"waits for {wanted}{of_size} on {rooms[0][0].host}{ends}{ours}", found[1].at
