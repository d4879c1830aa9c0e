"""Card usage, added up by user, label, card or month, and quotas on it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loractl.common.placement.shares import Allowance
from loractl.common.store.records import PastUse
from loractl.common.store.store import Store
from loractl.common.units import clock

GROUPS = {"user": ["user"], "label": ["label_set"], "card": ["node"], "month": ["hour"]}
"""What rows stand for, with the key that reads their sums."""

NO_LABEL = "no label"

FIGURES = ("card_hours", "gib_hours", "lost_hours", "waited_hours", "jobs")


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """The usage of one user, label, card or month."""

    name: str
    card_hours: float = 0.0  # hours of whole cards: a part counts as its share of the card's bytes
    gib_hours: float = 0.0
    lost_hours: float = 0.0  # card hours for steps that no checkpoint has kept
    waited_hours: float = 0.0  # of jobs, from when they could start to when they did
    jobs: int = 0  # ended

    def plus(self, use: PastUse) -> UsageRow:
        return replace(self, **{name: getattr(self, name) + getattr(use, name) for name in FIGURES})

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class UsageTable:
    """The usage since some hour, largest first, months in order."""

    by: str
    since: dt.datetime
    now: dt.datetime
    rows: tuple[UsageRow, ...]
    total: UsageRow  # counts a job with two labels once, though it is in two rows

    def as_json(self) -> dict[str, Any]:
        """`by`, `since`, `rows` and `total`."""
        return {
            "by": self.by,
            "since": self.since.isoformat(),
            "rows": [row.as_json() for row in self.rows],
            "total": self.total.as_json(),
        }


def usage_table(store: Store, by: str, since: dt.datetime) -> UsageTable:
    """`by`: one of GROUPS; months are in local time."""
    rows: dict[str, UsageRow] = {}
    total = UsageRow(name="total")
    for use in store.usage.since(since, GROUPS[by]):
        total = total.plus(use)
        for name in _names(use, by):
            rows[name] = rows.get(name, UsageRow(name=name)).plus(use)
    ordered = sorted(rows.values(), key=lambda row: row.name if by == "month" else (-row.card_hours, row.name))
    first = since.replace(minute=0, second=0, microsecond=0)
    return UsageTable(by=by, since=first, now=store.now(), rows=tuple(ordered), total=total)


def _names(use: PastUse, by: str) -> Iterator[str]:
    if by == "label":
        yield from (f"{key}={value}" for key, value in sorted(use.labels.items())) if use.labels else (NO_LABEL,)
    elif by == "month":
        yield "" if use.hour is None else use.hour.astimezone().strftime("%Y-%m")
    else:
        yield use.user if by == "user" else use.node


@dataclass(frozen=True, kw_only=True)
class QuotaList:
    """All quotas, by user."""

    quotas: Sequence[Allowance]
    now: dt.datetime

    def means(self, quota: Allowance) -> str:
        """What happens to the user's next jobs."""
        if not quota.exceeded:
            return "start"
        if quota.soft:
            return "go last"
        return "wait" + ("" if quota.below_at is None else f" until about {clock(quota.below_at, self.now)}")

    def as_json(self) -> list[dict[str, Any]]:
        """Each quota with its fields."""
        return [quota.as_json() for quota in self.quotas]


def quota_list(store: Store) -> QuotaList:
    """All quotas."""
    allowed = store.usage.allowances()
    return QuotaList(quotas=[allowed[user] for user in sorted(allowed)], now=store.now())
