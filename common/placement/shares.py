"""The fair share: how much of the cards a user has had lately."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loractl.common.units import GIB, duration

START_CHARGE_S = 3600.0
"""A job counts as if it had run this long as soon as it starts: a second job comes after another user's first."""

HALF_LIFE_S = 24 * 3600.0
"""After this time, use counts half against a user."""


WINDOWS = {"day": 86400, "week": 7 * 86400, "month": 30 * 86400}
"""Seconds of a quota's time."""


def parse_quota(text: str) -> tuple[float, int]:
    """Card hours and seconds of "100h/week". Raises ValueError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)h?/(day|week|month)", text)
    if found is None:
        raise ValueError("is not a quota")
    return float(found[1]), WINDOWS[found[2]]


def window_name(seconds: int) -> str:
    """Its name, or how long it is."""
    return next((name for name, length in WINDOWS.items() if length == seconds), duration(seconds))


LAST = 1e12
"""GiB hours that are added to the charge of a user beyond a soft quota: all others of the priority go first."""

NONE_LEFT = math.inf
"""The charge of a user beyond a quota: none of the user's jobs starts."""


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """A user's quota, in hours of whole cards, and what the user has had within its time."""

    user: str
    card_hours: float
    window_s: int
    soft: bool
    used: float  # within the last `window_s`, what runs included
    below_at: dt.datetime | None  # when what has ended is below it again; None: it is now

    @property
    def exceeded(self) -> bool:
        return self.used >= self.card_hours

    @property
    def words(self) -> str:
        """The quota: 100 a week."""
        return f"{self.card_hours:g} a {window_name(self.window_s)}{', soft' if self.soft else ''}"

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names, `exceeded`, and the time as ISO 8601."""
        below = None if self.below_at is None else self.below_at.isoformat()
        return {**vars(self), "below_at": below, "exceeded": self.exceeded}

    def on(self, charge: float) -> float:
        """The charge that counts."""
        return charge if not self.exceeded else charge + LAST if self.soft else NONE_LEFT


def decayed(amount: float, seconds: float) -> float:
    """How much a use of `amount` still counts after `seconds`; after HALF_LIFE_S it is half."""
    return float(amount * 0.5 ** (max(0.0, seconds) / HALF_LIFE_S))


def charge(past: float, running: Iterable[tuple[int, float]]) -> float:
    """GiB hours that count against a user: decayed past use, and what runs (bytes reserved, seconds so far)."""
    return past + sum(size / GIB * max(seconds, START_CHARGE_S) / 3600 for size, seconds in running)


def within_need(reserved: int, need: int | None) -> int:
    """Bytes that a job is charged for where it may reserve more than its need: nobody else wanted the rest."""
    return reserved if need is None else min(reserved, need)
