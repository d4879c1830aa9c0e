"""Card hours: how use of the cards is counted, and what users with a quota have used on the clock of a replay."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from .cards import Card
from .rule import Placement
from .shares import Allowance

HOUR = dt.timedelta(hours=1)

MOST_HOURS = 100 * 24
"""Of one attempt. A longer one is taken for the fault of a clock, and counts in the hour of its end. Hours that a clock
invents fill a quota as their time comes, so the bound is how long such a fault can cost a user the turn. Attempts of
weeks are real and must count; one of a hundred days without a stop would count too little."""

AHEAD = HOUR
"""Hours that begin later than this do not count against a quota: a clock that was ahead has written them."""


def by_hour(start: dt.datetime, end: dt.datetime) -> Iterator[tuple[dt.datetime, float]]:
    """The hours that a time touches, each by its start, and how much of the time is within."""
    if (end - start) / HOUR > MOST_HOURS:
        start = max(start, begin_of(end))
    hour = begin_of(start)
    while hour <= end:
        yield hour, max(0.0, (min(end, hour + HOUR) - max(start, hour)) / HOUR)
        hour += HOUR


def begin_of(moment: dt.datetime) -> dt.datetime:
    return moment.astimezone(dt.UTC).replace(minute=0, second=0, microsecond=0)


def card_share(size: float, total: int | None) -> float:
    """The part of a card; of an unknown card, the whole."""
    return min(1.0, size / total) if total else 1.0


@dataclass(frozen=True, kw_only=True)
class PastCardHours:
    """What a user with a quota had before a replay."""

    charge: float = 0.0  # GiB hours that count for the fair share, whatever the quota says
    ended: Mapping[dt.datetime, float] = field(default_factory=dict)  # card hours of ended attempts, by hour
    running: Mapping[int, float] = field(default_factory=dict)  # card hours so far, by running job


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a running job holds, and its card hours up to a moment."""

    user: str
    sizes: Mapping[str, int]  # bytes that count, by card
    start: dt.datetime
    as_of: dt.datetime
    hours: float = 0.0


class QuotaMeter:
    """The card hours of users with quotas as a replay goes on, counted as the database counts them: ended attempts by
    the hour, until their hours are out of the quota's time; what runs, from its start on.

    `allowed`: the quotas; `totals`: bytes of each card; `past`: what was used before the replay.
    """

    def __init__(
        self,
        allowed: Mapping[str, Allowance],
        totals: Mapping[str, int],
        past: Mapping[str, PastCardHours] | None = None,
    ) -> None:
        self._allowed = allowed
        self._totals = totals
        self._ended = {user: dict(past[user].ended) if past and user in past else {} for user in allowed}
        self._before = {job_id: hours for one in (past or {}).values() for job_id, hours in one.running.items()}
        self._held: dict[int, _Held] = {}

    def take_over(self, cards: Iterable[Card], now: dt.datetime, needs: Mapping[int, int]) -> None:
        """Go on with what runs already. `needs`: bytes that count of jobs that hold more."""
        sizes = dict[int, dict[str, int]]()
        for card in cards:
            for job in card.running:
                size = min(job.reserved, needs.get(job.job_id, job.reserved))
                sizes.setdefault(job.job_id, {})[card.node] = size
                self._held[job.job_id] = _Held(
                    user=job.user, sizes=sizes[job.job_id], start=job.began or now, as_of=now,
                    hours=self._before.get(job.job_id, 0.0),
                )  # fmt: skip

    def began(self, placed: Placement, now: dt.datetime) -> None:
        """A job has started."""
        job, sizes = placed.job, {share.node: share.bytes for share in placed.shares}
        self._held[job.job_id] = _Held(user=job.user, sizes=sizes, start=now, as_of=now)

    def ended(self, job_id: int, now: dt.datetime) -> None:
        """A job has left its cards."""
        job = self._held.pop(job_id)
        length = (now - job.start) / HOUR
        if (quota := self._allowed.get(job.user)) is None or not length:
            return
        since, ended, hours = now - dt.timedelta(seconds=quota.window_s), self._ended[job.user], self._hours(job, now)
        for hour, part in by_hour(job.start, now):
            ended[hour] = ended.get(hour, 0.0) + hours * part / length
        self._ended[job.user] = {hour: had for hour, had in ended.items() if hour > since}

    def _counting(self, user: str, now: dt.datetime) -> dict[dt.datetime, float]:
        """Card hours of ended attempts within the quota's time, by hour."""
        since = now - dt.timedelta(seconds=self._allowed[user].window_s)
        return {hour: had for hour, had in self._ended[user].items() if since < hour <= now + AHEAD}

    def at(self, now: dt.datetime) -> dict[str, Allowance]:
        """The quotas, and what is used of them."""
        return {
            user: replace(quota, used=self._used(user, now), below_at=None) for user, quota in self._allowed.items()
        }

    def below_at(self, users: Iterable[str], now: dt.datetime) -> dt.datetime | None:
        """When the first of these users whose jobs wait for a quota falls below it, if nothing ends before."""
        hard = [user for user in users if user in self._allowed and not self._allowed[user].soft]
        over = [user for user in hard if self._used(user, now) >= self._allowed[user].card_hours]
        return min((moment for user in over if (moment := self._below_at(user, now)) is not None), default=None)

    def _below_at(self, user: str, now: dt.datetime) -> dt.datetime | None:
        quota, ended = self._allowed[user], self._counting(user, now)
        window, held = dt.timedelta(seconds=quota.window_s), [job for job in self._held.values() if job.user == user]
        hours = sorted(ended)
        left = [*accumulate((ended[hour] for hour in reversed(hours)), initial=0.0)]  # of the last 0, 1, 2, ...
        for number, hour in enumerate(hours, start=1):
            running = sum(self._hours(job, hour + window) for job in held)
            if running >= quota.card_hours:
                return None
            if running + left[len(hours) - number] < quota.card_hours:
                return hour + window
        return None

    def _used(self, user: str, now: dt.datetime) -> float:
        """Card hours within the quota's time. What runs counts whole."""
        running = sum(self._hours(job, now) for job in self._held.values() if job.user == user)
        return running + sum(self._counting(user, now).values())

    def _hours(self, job: _Held, now: dt.datetime) -> float:
        cards = sum(card_share(size, self._totals.get(node)) for node, size in job.sizes.items())
        return job.hours + (now - job.as_of) / HOUR * cards
