"""Preemption: which running jobs would have to stop for one of higher priority, or for one that is much shorter.

Pure functions of values. The fleet's round, `loractl why` and the replay all ask `first_stop`, so they agree.

A running job yields to a much shorter one if all of this holds:

- what is left of it is at least RATIO times what is left of the waiting one and what the stop costs; what slows it
  against jobs just like it, such as others on its card, would slow the waiting one there too;
- the priority of the waiting one is no lower;
- the waiting one would go before it in the rule's order, if both waited;
- it has run undisturbed for long enough (`undisturbed_s`), twice as long for each time that it was stopped before;
- no card has room for the waiting one within the time that the stop costs.

Whatever the reason, the rule must give the waiting one its place also where those that stop wait beside it.

So no job yields for ever: one that runs T seconds in all yields at most log2(T / UNDISTURBED_S + 1) times.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loractl.common.job.method import Method, Need, SharedNeed
from loractl.common.units import GIB

from .cards import Card, Occupant, Yields, largest_gpu, lasts, least_limit, takes
from .duration import LATE_S, LATE_SHARE, UNKNOWN_S
from .gangs import gang_of, takers
from .lines import Queue, Waiting, With
from .rule import Placement, jobs_by_user, place, turns_in
from .shares import LAST, NONE_LEFT, START_CHARGE_S

RATIO = 4.0
"""What is left of a job that yields is at least this many times what the other one and the stop take."""

UNDISTURBED_S = 600.0
"""A job runs for at least this long before it yields for the first time."""

COST_SHARE = 0.03
"""The most of the cards' time that stops may cost: a job runs undisturbed for the cost of one over this."""

AT_ONCE = 16
"""Stops that one round tries: each asks the whole rule once more."""


@dataclass(frozen=True, kw_only=True)
class Preemption:
    """Running jobs that are to stop for a waiting one."""

    job: Waiting
    node: str  # where; of several cards " and " joins the names
    going: tuple[int, ...]
    is_shorter: bool  # the waiting one is much shorter; else it has a higher priority


def first_stop(
    queue: Queue,
    cards: Sequence[Card],
    charges: Mapping[str, float],
    now: dt.datetime,
    *,
    by_share: bool = False,
    yields: bool = True,
    least_s: float | None = None,
    may_ask: Callable[[Waiting], bool] = lambda job: True,
) -> Preemption | None:
    """The jobs that should stop now for the first waiting job that nothing else helps; None: no stop helps.

    One stop is under way at a time. `by_share`: in the order of before, where no job yields to a shorter one.
    `yields`: whether the lab has its jobs yield to shorter ones. `least_s`: the lab's own time undisturbed. `may_ask`:
    whether longer jobs may yield to a waiting one: it yields itself.
    """
    running = [one for card in cards for one in card.running]
    yielding = _yielding(cards, charges, now, least_s) if yields and not by_share else {}
    if any(one.gives_way_to is not None for one in running) or not (yielding or any(r.preemptible for r in running)):
        return None
    longest = max((left_s(one, now) for some in yielding.values() for one in some), default=0.0)
    lowest = min((one.priority for one in running if one.preemptible), default=math.inf)
    helped = [job for job in queue.firsts() if RATIO * job.left_s <= longest or job.priority > lowest]
    if not helped:
        return None
    turn = turns_in(by_share, charges, now)
    waiting = [job for job in sorted(helped, key=turn) if _could(job, cards)]
    served: set[int] | None = None
    ways = _ways(waiting, cards, charges, yielding, turn, now, may_ask)
    for stop in itertools.islice(ways, AT_ONCE):
        if served is None:  # read late: most rounds find no way, and need not ask the rule
            decided = [one.placed or one.declined for one in place(queue, cards, charges, now, by_share)]
            served = {one.job.job_id for one in decided if one is not None}
        if stop.job.job_id in served:
            continue
        left = [card.without(stop.going) for card in cards]
        going = {one.job_id: _waiting(one, now) for one in running if one.job_id in stop.going}
        then = place(With(queue, going.values()), left, _once_stopped(charges, running, stop, now), now, by_share)
        placed = [one.placed for one in then if one.placed is not None]
        if all(one.job.job_id != stop.job.job_id for one in placed):
            # its user is at a limit, or others go before it or have the card kept for them; or those that stop would
            # take their card back, and be asked again and again
            continue
        if not stop.is_shorter or not _takes_its_place(stop, placed, running, turn, now):
            return stop
    return None


def _once_stopped(
    charges: Mapping[str, float], running: Iterable[Occupant], stop: Preemption, now: dt.datetime
) -> dict[str, float]:
    """The charges once its jobs have stopped: a job that runs counts as if it had for START_CHARGE_S at least, one that
    has ended as long as it did."""
    after = dict(charges)
    for one in running:
        if one.job_id in stop.going and one.began is not None:
            short_s = max(0.0, START_CHARGE_S - (now - one.began).total_seconds())
            after[one.user] = max(0.0, after.get(one.user, 0.0) - one.reserved / GIB * short_s / 3600)
    return after


def _is_free(job: Waiting, cards: Sequence[Card], charges: Mapping[str, float]) -> bool:
    """Whether its user may start a job: no limit or quota is reached."""
    limit = least_limit(cards)
    reached = limit is not None and jobs_by_user(cards).get(job.user, 0) >= limit
    return not reached and charges.get(job.user) != NONE_LEFT


def _takes_its_place(
    stop: Preemption,
    placed: Iterable[Placement],
    running: Iterable[Occupant],
    turn: Callable[[Waiting], tuple[float, ...]],
    now: dt.datetime,
) -> bool:
    """Whether a job that goes after one that stops would start on its card beside the short one: it would
    wait for that one, too."""
    first = min(turn(_waiting(one, now)) for one in running if one.job_id in stop.going)
    others = (one for one in placed if one.job.job_id not in (stop.job.job_id, *stop.going))
    return any(first < turn(one.job) and stop.node in (share.node for share in one.shares) for one in others)


def _could(job: Waiting, cards: Sequence[Card]) -> bool:
    return job.bound is not None and any(card.open and job.requires <= card.labels for card in cards)


def _ways(
    waiting: Iterable[Waiting],
    cards: Sequence[Card],
    charges: Mapping[str, float],
    yielding: Mapping[str, Sequence[Occupant]],
    turn: Callable[[Waiting], tuple[float, ...]],
    now: dt.datetime,
    may_ask: Callable[[Waiting], bool],
) -> Iterator[Preemption]:
    """For the first waiting job of each user and priority that a stop may help: others of theirs must wait for it."""
    met, turns = set[tuple[str, int]](), dict[int, tuple[float, ...]]()
    for some in yielding.values():
        turns |= {one.job_id: turn(_waiting(one, now)) for one in some}
    for job in waiting:
        if (job.user, job.priority) in met:
            continue
        way, is_shorter = give_way(job, cards), False
        if way is None and _is_free(job, cards, charges):
            way, is_shorter = yield_to(job, cards, yielding, turn(job), turns, now), True
        if way is not None and (not is_shorter or may_ask(job)):
            met.add((job.user, job.priority))
            yield Preemption(job=job, node=way[0], going=way[1], is_shorter=is_shorter)


def undisturbed_s(yields: Yields, least_s: float | None = None) -> float:
    """How long a job runs before it yields: so long that stops cost no more than their share. `least_s`: the lab's own
    word in place of both bounds."""
    once = max(UNDISTURBED_S, yields.cost_s / COST_SHARE) if least_s is None else least_s
    return once * 2.0 ** min(yields.stops, _MOST_DOUBLED)


_MOST_DOUBLED = 30
"""Ten minutes, doubled so often, are 20,000 years."""


def left_s(job: Occupant, now: dt.datetime) -> float:
    """Seconds that are left of a running job. One that has outlived its expected end has a tenth of its time left; of
    those with no known end, what has run longest is longest."""
    ran_s = 0.0 if job.began is None else (now - job.began).total_seconds()
    if job.ends is None:
        return max(UNKNOWN_S, ran_s)
    ahead_s = (job.ends - now).total_seconds()
    return ahead_s if ahead_s > 0 else max(LATE_SHARE * ran_s, LATE_S)


def may_yield_at(card: Card, job: Occupant, least_s: float | None = None) -> dt.datetime | None:
    """From when on the job may yield; None: it never does. On a card whose worker stops by itself it might have no way
    back."""
    if job.yields is None or job.began is None or not card.open or card.left_s is not None:
        return None
    return job.began + dt.timedelta(seconds=undisturbed_s(job.yields, least_s))


def next_look(cards: Iterable[Card], now: dt.datetime, least_s: float | None = None) -> dt.datetime | None:
    """When the next running job may yield that may not yet; None: none."""
    moments = (may_yield_at(card, job, least_s) for card in cards for job in card.running)
    return min((at for at in moments if at is not None and at > now), default=None)


def _yielding(
    cards: Sequence[Card], charges: Mapping[str, float], now: dt.datetime, least_s: float | None
) -> dict[str, list[Occupant]]:
    """The jobs of each card that may yield now; a job on several cards never does, nor one whose user is beyond a
    quota: it might have no way back."""
    on = itertools.chain.from_iterable(card.running for card in cards)
    counts: dict[int, int] = {}
    for job in on:
        counts[job.job_id] = counts.get(job.job_id, 0) + 1
    found = dict[str, list[Occupant]]()
    for card in cards:
        for job in card.running:
            at = may_yield_at(card, job, least_s)
            if at is None or at > now or counts[job.job_id] > 1 or card.silent:
                continue
            if charges.get(job.user, 0.0) < LAST:
                found.setdefault(card.node, []).append(job)
    return found


def yield_to(
    job: Waiting,
    cards: Sequence[Card],
    yielding: Mapping[str, Sequence[Occupant]],
    mine: tuple[float, ...],
    turns: Mapping[int, tuple[float, ...]],
    now: dt.datetime,
) -> tuple[str, tuple[int, ...]] | None:
    """A card, and the running jobs that would have to stop there for a much shorter one; None: no such stop pays.

    As few jobs as possible, then those that have most left. Nothing yields to a job on several cards. `mine`: its place
    in the order; `turns`: those of the jobs that may yield.
    """
    if gang_of(job, cards) is not None:
        return None

    def longer(card: Card) -> list[Occupant]:
        """Those that are much longer than the waiting one, and would wait behind it."""
        return [
            one
            for one in yielding.get(card.node, ())
            if one.yields is not None
            and one.priority <= job.priority
            and left_s(one, now) >= RATIO * (job.left_s * one.yields.slowed + one.yields.cost_s)
            and mine < turns[one.job_id]
        ]

    def rank(going: Sequence[Occupant]) -> tuple[float, ...]:
        return len(going), -sum(left_s(one, now) for one in going)

    some = [card for card in cards if longer(card)]
    found = _on_one(job, some, cards, lambda card, size: _longest(card, size, longer(card), now), rank)
    if found is None:
        return None
    cost_s = sum(one.yields.cost_s for one in found[1] if one.yields is not None)
    return None if _has_room_within(cost_s, job, cards, now) else (found[0], _numbers(found[1]))


def _on_one(
    job: Waiting,
    some: Iterable[Card],
    cards: Sequence[Card],
    choose: Callable[[Card, int], Sequence[Occupant] | None],
    rank: Callable[[Sequence[Occupant]], tuple[float, ...]],
) -> tuple[str, Sequence[Occupant]] | None:
    """Of some cards the one where the best of the chosen groups makes room for the job, and that group."""
    largest, options = largest_gpu(cards), []
    for card in (c for c in some if c.open and takes(c, job, cards, largest)):
        for index, method in enumerate(job.methods):
            size = job.need.of(method)
            if size is not None and (going := choose(card, size)):
                options.append((rank(going), index, card.node, _numbers(going), going))
    if not options:
        return None
    *_, node, _, going = min(options, key=lambda option: option[:-1])
    return node, going


def _numbers(going: Iterable[Occupant]) -> tuple[int, ...]:
    return tuple(one.job_id for one in going)


def _waiting(one: Occupant, now: dt.datetime) -> Waiting:
    """A running job as it would wait."""
    return Waiting(
        job_id=one.job_id, user=one.user, priority=one.priority, since=one.since or now, methods=(Method.LORA,),
        need=Need(lora=one.reserved, qlora=None), left_s=left_s(one, now),
    )  # fmt: skip


def _longest(card: Card, size: int, longer: Sequence[Occupant], now: dt.datetime) -> list[Occupant] | None:
    """As few jobs as make room, and among those the longest."""
    by_length = sorted(longer, key=lambda one: (-left_s(one, now), one.job_id))
    if (enough := next((one for one in by_length if _has_room(card, size, [one])), None)) is not None:
        return [enough]
    by_size = sorted(longer, key=lambda one: (-max(one.reserved, one.used), one.job_id))
    counts = range(2, len(by_size) + 1)
    return next((by_size[:count] for count in counts if _has_room(card, size, by_size[:count])), None)


def _has_room_within(seconds: float, job: Waiting, cards: Sequence[Card], now: dt.datetime) -> bool:
    """Whether some card will have room for the job by itself by then."""
    largest, sizes = largest_gpu(cards), [*filter(None, map(job.need.of, job.methods))]

    def on(card: Card) -> bool:
        ending = [one for one in card.running if left_s(one, now) <= seconds]
        has_room = any(_has_room(card, size, ending) for size in sizes)  # asked first: it is cheap, and mostly not so
        return has_room and card.open and takes(card, job, cards, largest) and lasts(card, job, seconds)

    return any(map(on, cards))


def give_way(job: Waiting, cards: Sequence[Card]) -> tuple[str, tuple[int, ...]] | None:
    """A card, and the running jobs that would have to stop there for a job of higher priority; None: no stop helps.

    As few jobs as possible; first those of the lowest priority, then those that hold least.
    """
    if not any(_willing(job, card) for card in cards):
        return None
    if (gang := gang_of(job, cards)) is not None:
        return _for_gang(job, gang, cards)
    found = _on_one(job, cards, cards, lambda card, size: _fewest(card, size, _willing(job, card)), _cost)
    return None if found is None else (found[0], _numbers(found[1]))


def _for_gang(job: Waiting, gang: SharedNeed, cards: Sequence[Card]) -> tuple[str, tuple[int, ...]] | None:
    """Cards for a job on several, as a phrase, and the jobs that would have to stop on any of them. It does
    not begin on a silent card: stopping jobs for that one would gain nothing."""
    options, heard = [], [card for card in takers(job, gang, cards) if not card.silent]
    for method in job.methods:
        size = gang.need.of(method)
        if size is None:
            continue
        ways = [(card, going) for card in heard if (going := _leaving(job, card, size)) is not None]
        for host in {card.host for card, _ in ways}:
            of_box = sorted(
                (pair for pair in ways if pair[0].host == host), key=lambda way: (_cost(way[1]), way[0].node)
            )
            chosen = of_box[: gang.cards]
            going = list({j.job_id: j for _, leaving in chosen for j in leaving}.values())
            if len(chosen) == gang.cards and going:
                nodes = " and ".join(card.node for card, _ in chosen)
                options.append((*_cost(going), nodes, tuple(j.job_id for j in going)))
    return min(options)[3:] if options else None


def _willing(job: Waiting, card: Card) -> list[Occupant]:
    return [j for j in card.running if j.preemptible and j.priority < job.priority]


def _leaving(job: Waiting, card: Card, size: int) -> list[Occupant] | None:
    """The jobs that would have to stop on the card; none if it has room."""
    return [] if _has_room(card, size, []) else _fewest(card, size, _willing(job, card))


def _cost(going: Sequence[Occupant]) -> tuple[int, int, int]:
    return len(going), max((j.priority for j in going), default=-(2**31)), sum(j.reserved for j in going)


def _fewest(card: Card, size: int, willing: Sequence[Occupant]) -> list[Occupant] | None:
    """The smallest group of willing jobs that leaves room for `size` bytes and a slot when it ends: as few as possible,
    of the lowest priorities that suffice, and each the least that does."""
    for count in range(1, len(willing) + 1):
        for priority in sorted({job.priority for job in willing}):
            low = [job for job in willing if job.priority <= priority]
            # try the largest: if these are too small, any other group of this size is, too
            going = sorted(low, key=lambda j: -max(j.reserved, j.used))[:count]
            if len(going) == count and _has_room(card, size, going):
                return _spared(card, size, going, low)
    return None


def _spared(card: Card, size: int, going: list[Occupant], low: Sequence[Occupant]) -> list[Occupant]:
    """Replace each job, from the highest priority on, by the one of the lowest priority that frees enough room."""
    for one in sorted(going, key=lambda j: (-j.priority, -j.reserved)):
        rest = [job for job in going if job is not one]
        enough = [job for job in low if job not in rest and _has_room(card, size, [*rest, job])]
        going = [*rest, min(enough, key=lambda j: (j.priority, j.reserved))]
    return going


def _has_room(card: Card, size: int, going: Sequence[Occupant]) -> bool:
    """Whether these leave room and a slot."""
    then = card.without([job.job_id for job in going])
    return then.free >= size and then.slots > 0
