"""What loractl gc removes, and what loractl doctor finds, for a terminal."""

from __future__ import annotations

from collections import Counter

from loractl.common.text import clean_line
from loractl.common.units import amount
from loractl.scheduler.answers.health.condition import Diagnosis, Level
from loractl.scheduler.upkeep.garbage import Cleared, Garbage, Kind
from loractl.scheduler.upkeep.roles import RolesAnswer

from .screen import Screen, joined, wrapped_table

_COLORS = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red", Level.SKIPPED: "white"}


def line(garbage: Garbage) -> str:
    """One thing that goes, and why."""
    what = f"{garbage.kind.value:<11}  {amount(garbage.size):>9}"
    return f"{what}  {clean_line(garbage.name)}  ({clean_line(garbage.why)})"


def total(cleared: Cleared) -> str:
    """One sentence for all of it; what is in the database stands apart from files."""
    verb = "Would free" if cleared.dry_run else "Freed"
    if not cleared.removed:
        return f"{verb} nothing: everything that is stored is needed."
    counts = Counter(garbage.kind for garbage in cleared.removed)
    rows = sum(garbage.size for garbage in cleared.removed if not garbage.kind.is_file)
    parts = ", ".join(f"{kind.value} {counts[kind]}" for kind in Kind if counts[kind])
    stored = f", and about {amount(rows)} of rows in the database" if rows else ""
    return f"{verb} {amount(cleared.size)}{stored} ({parts})."


def health(diagnosis: Diagnosis, screen: Screen) -> str:
    """A line for each part of the installation, below it what to do, and at the end how many are not in order."""
    rows, colors = [], []
    for condition in diagnosis.conditions:
        color = _COLORS[condition.level]
        rows.append([condition.check, screen.style(condition.level.value, fg=color), clean_line(condition.sentence)])
        colors.append("" if condition.level is Level.OK else color)
        if condition.hint and condition.level is not Level.OK:
            rows.append(["", "", clean_line(f"> {condition.hint}")])
            colors.append("")
    counts = {level: diagnosis.count(level) for level in (Level.ERROR, Level.WARNING, Level.SKIPPED)}
    told = ", ".join(f"{count} {level.value}" for level, count in counts.items() if count)
    lines = wrapped_table(["CHECK", "STATE", "WHAT WAS FOUND"], rows, colors, screen, right=())
    return joined([*lines, "", f"{told}." if told else "All is well."], screen)


def roles(answer: RolesAnswer) -> str:
    """What was done, and each new password, as the address that its owner needs."""
    made = f"New roles: {', '.join(answer.new_roles)}." if answer.new_roles else "The roles were there."
    lines = [f"{made} Their rights are those of revision {answer.revision}."]
    for login in answer.logins:
        how = "is a new login" if login.new else "is there" if login.url is None else "has a new password"
        lines.append(f"{login.name} {how}, with the role {login.role}." + ("" if login.url else " Its password stays."))
        lines += [f"    LORACTL_DATABASE_URL={login.url}"] if login.url else []
    if any(login.url for login in answer.logins):
        lines.append("No password is shown again.")
    return "\n".join(lines)
