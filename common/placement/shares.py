"""The fair share: how much of the cards a user has had lately."""

from __future__ import annotations

from collections.abc import Iterable

from loractl.common.units import GIB

START_CHARGE_S = 3600.0
"""A job counts as if it had run for so long as soon as it starts: a second job comes after another user's first."""

HALF_LIFE_S = 24 * 3600.0
"""Use counts half against a user after so long."""


def decayed(amount: float, seconds: float) -> float:
    """How much a use of `amount` still counts after `seconds`; after HALF_LIFE_S it is half."""
    return float(amount * 0.5 ** (max(0.0, seconds) / HALF_LIFE_S))


def charge(past: float, running: Iterable[tuple[int, float]]) -> float:
    """GiB hours that count against a user: decayed past use, and what runs (bytes reserved, seconds so far)."""
    return past + sum(size / GIB * max(seconds, START_CHARGE_S) / 3600 for size, seconds in running)
