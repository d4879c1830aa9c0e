"""The window of a worker: when it stops by itself, and how long a stop may take."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass

from loractl.common.errors import UsageError
from loractl.common.units import duration, parse_moment

GRACE_S = 180.0
"""How long before its end a worker begins to stop by default: time for a step, its checkpoint and the upload."""

END_VARIABLE = "SLURM_JOB_END_TIME"
"""Slurm's variable: when the allocation ends, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The time until which a worker may run."""

    ends: dt.datetime  # it must have ended by then
    said_by: str  # the option or variable that set the end
    grace_s: float

    @property
    def stops(self) -> dt.datetime:
        """When it begins to stop."""
        return self.ends - dt.timedelta(seconds=self.grace_s)


def read_window(
    until: str | None, lasts_s: float | None, grace_s: float | None, environment: Mapping[str, str], now: dt.datetime
) -> Window | None:
    """The window with the earliest of all given ends; None: no end was given, so the worker stays. Raises UsageError.

    `until`: a time or a duration; `lasts_s`: seconds from now.
    """
    ends: list[tuple[dt.datetime, str]] = []
    if until is not None:
        try:
            ends.append((parse_moment(until, now), "--until"))
        except ValueError as error:
            raise UsageError(f"--until: {until!r} {error}", "like 18:00, 2026-12-24T18:00 or 4h") from None
    if lasts_s is not None:
        ends.append((now + dt.timedelta(seconds=lasts_s), "--for"))
    if (text := environment.get(END_VARIABLE)) is not None:
        ends.append((_slurm_end(text), END_VARIABLE))
    if not ends:
        return None
    (end, said_by), grace_s = min(ends), GRACE_S if grace_s is None else grace_s
    left_s = (end - now).total_seconds()
    if left_s <= 0:
        raise UsageError(f"{said_by}: that time has passed", _STALE if said_by == END_VARIABLE else None)
    if left_s <= grace_s:
        raise UsageError(
            f"{said_by}: only {duration(left_s)} are left, but a stop may take {duration(grace_s)}",
            "choose a later end or a shorter stop, like --grace 30s",
        )
    return Window(ends=end, said_by=said_by, grace_s=grace_s)


_STALE = f"this shell was started in an allocation that has ended: unset {END_VARIABLE}"


def _slurm_end(text: str) -> dt.datetime:
    try:
        return dt.datetime.fromtimestamp(int(text), dt.UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"{END_VARIABLE} is not a time in seconds since 1970: {text[:40]!r}",
            f"unset {END_VARIABLE}, and use --until",
        ) from None
