"""What loractl gc removes, or would remove, for a terminal."""

from __future__ import annotations

from collections import Counter

from loractl.common.text import clean_line
from loractl.common.units import amount

from .cleaner import Cleared, Garbage, Kind


def line(garbage: Garbage) -> str:
    """One thing that goes, and why."""
    what = f"{garbage.kind.value:<11}  {amount(garbage.size):>9}"
    return f"{what}  {clean_line(garbage.name)}  ({clean_line(garbage.why)})"


def total(cleared: Cleared) -> str:
    """One sentence for all of it; rows in the database are counted apart from files."""
    verb = "Would free" if cleared.dry_run else "Freed"
    if not cleared.removed:
        return f"{verb} nothing: everything that is stored is needed."
    counts = Counter(garbage.kind for garbage in cleared.removed)
    rows = sum(garbage.size for garbage in cleared.removed if not garbage.kind.is_file)
    parts = ", ".join(f"{kind.value} {counts[kind]}" for kind in Kind if counts[kind])
    stored = f", and about {amount(rows)} of rows in the database" if rows else ""
    return f"{verb} {amount(cleared.size)}{stored} ({parts})."
