"""Sizes, durations and times as people write them in a job file and read them in a table."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable

from .errors import UsageError

KIB, MIB, GIB = 1024, 1024**2, 1024**3

LAST_NUMBER = 2**53 - 1
"""The greatest number of a job or a sweep: every reader of JSON has it exactly."""

LARGEST = 2**31 - 1
"""The largest whole number of a row: PostgreSQL's INTEGER ends here, and SQLite's at 64 bits."""

LEAST_WITHOUT_UNIT = 2**20
"""Bytes; a smaller number needs a unit."""

_BYTES = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 2**10,  # as Slurm takes its sizes
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_size(text: str | int) -> int:
    """Bytes of "24GiB", "24G", "500 MB" or a plain number of bytes. Raises ValueError with what would be right.

    A plain number below 1 MiB is refused, except 0: somebody meant GiB, and so few bytes are no size of ours.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {name.lower(): factor for name, factor in _BYTES.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"is not a size{_sign(text)}; write it like 12GiB or 800MiB")
    if not match[2] and 0 < float(match[1]) < LEAST_WITHOUT_UNIT:
        raise ValueError(f"is not a size: it has no unit; write {match[1]}GiB or {match[1]}MiB")
    return int(float(match[1]) * units[match[2].lower()])


def _sign(text: str | float) -> str:
    return ": it is below zero" if re.match(r"\s*[-\N{MINUS SIGN}]\s*\d", str(text)) else ""


def size_of(source: str, text: str) -> int:
    """The bytes that an option or a variable asks for. Raises UsageError with its name."""
    return int(_asked(parse_size, source, text))


def seconds_of(source: str, text: str) -> float:
    """The seconds that an option or a variable asks for. Raises UsageError with its name."""
    return _asked(parse_duration, source, text)


def _asked(parse: Callable[[str], float], source: str, text: str) -> float:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{source}: {text!r} {error}") from None


def parse_duration(text: str | int | float) -> float:
    """Seconds of "90s", "30m", "2h", "1d", "1h30m" or a plain number of seconds. Raises ValueError."""
    compact = str(text).replace(" ", "").lower()
    if re.fullmatch(r"\d{1,18}(\.\d+)?", compact):
        return float(compact)
    parts = re.findall(r"(\d{1,18}(?:\.\d+)?)(min|[smhd])", compact)
    if not parts or "".join(a + b for a, b in parts) != compact:
        raise ValueError(f"is not a duration{_sign(text)}; write it like 90s, 30m, 2h or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def parse_moment(text: str, now: dt.datetime) -> dt.datetime:
    """A moment after `now`: in "2h", at "18:00" next, at "2026-12-24" or "2026-12-24T18:00" by local time. Raises
    ValueError."""
    try:
        return now + dt.timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):  # the second: beyond the calendar
        pass
    local = now.astimezone()
    try:
        if re.fullmatch(_CLOCK, text):
            today = dt.datetime.combine(local.date(), dt.time.fromisoformat(text)).astimezone()
            return today if today > now else (today.replace(tzinfo=None) + dt.timedelta(days=1)).astimezone()
    except ValueError:
        pass
    moment = parse_date(text)
    if moment <= now:
        raise ValueError("is in the past")
    return moment


_CLOCK = r"\d\d:\d\d(:\d\d)?"


def parse_date(text: str) -> dt.datetime:
    """A local date, or date and time. Python's own reader also takes 00:00:00:00. Raises ValueError."""
    try:
        if re.fullmatch(rf"\d{{4}}-\d\d-\d\d([T ]{_CLOCK}(Z|[+-]\d\d:\d\d)?)?", text):
            return dt.datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        pass
    raise ValueError("is neither a duration nor a time")


def gib(size: int | float | None) -> str:
    """Bytes as GiB with one decimal, "–" when unknown."""
    return "–" if size is None else f"{size / GIB:.1f}"


def hours(value: float) -> str:
    """Hours as "12.3", and below one with the digits that tell them from none: "0.21", "0.0042"."""
    if value == 0 or value >= 1:
        return f"{value:.1f}"
    return f"{value:.2g}" if value >= 0.0001 else "<0.0001"


def amount(size: int) -> str:
    """Bytes of files as "812 B", "14.2 KiB", "3.1 MiB", "1.2 GiB", wherever people read of them; as memory."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _BYTES[unit]:
            return f"{size / _BYTES[unit]:.1f} {unit}"
    return f"{size} B"


def duration(seconds: float | None) -> str:
    """Seconds as "45 s", "12 min", "1 h 58 min", "3 d 4 h"."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(moment: dt.datetime | None, now: dt.datetime) -> str:
    """HH:MM today, the weekday this week, else the date; local time."""
    if moment is None:
        return "–"
    local, today = moment.astimezone(), now.astimezone()
    if local.date() == today.date():
        return local.strftime("%H:%M")
    return local.strftime("%a %H:%M") if abs((local - today).days) < 6 else local.strftime("%d %b")


def thousands(number: int | None) -> str:
    """1584 as "1 584"."""
    return "–" if number is None else f"{number:,}".replace(",", " ")
