"""What doctor finds, and a lab that was set up or joined, for a terminal."""

from __future__ import annotations

import datetime as dt

from loractl.common.text import clean_line
from loractl.common.units import clock
from loractl.scheduler.cli.screen import Screen, joined, wrapped_table

from .health.condition import Diagnosis, Level
from .join import JoinAnswer
from .lab import JoinTicket, LabAnswer

_COLORS = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red", Level.SKIPPED: "white"}


def health(diagnosis: Diagnosis, screen: Screen) -> str:
    """A line for each part of the installation, what to do below it, and at the end how many have problems."""
    rows, colors = [], []
    for condition in diagnosis.conditions:
        color = _COLORS[condition.level]
        rows.append([condition.check, screen.style(condition.level.value, fg=color), clean_line(condition.sentence)])
        colors.append("" if condition.level is Level.OK else color)
        if condition.hint and condition.level is not Level.OK:
            rows.append(["", "", clean_line(f"> {condition.hint}")])
            colors.append("")
    counts = {level: diagnosis.count(level) for level in (Level.ERROR, Level.WARNING, Level.SKIPPED)}
    words = {Level.ERROR: "errors", Level.WARNING: "warnings"}
    named = {level: level.value if count == 1 else words.get(level, level.value) for level, count in counts.items()}
    told = ", ".join(f"{count} {named[level]}" for level, count in counts.items() if count)
    lines = wrapped_table(["CHECK", "STATE", "WHAT WAS FOUND"], rows, colors, screen, right=())
    return joined([*lines, "", f"{told}." if told else "All is well."], screen)


def lab_made(answer: LabAnswer) -> str:
    """What was done, and the first lines."""
    tables = f"at revision {answer.revision}" + (", new" if answer.revision_before is None else "")
    made = f"made: {', '.join(answer.new_roles)}" if answer.new_roles else "there"
    return "\n".join([*answer.done, f"The tables are {tables}; the roles are {made}.", "", invited(answer)])


def invited(answer: LabAnswer) -> str:
    """The join lines, each below what it is for."""
    lines = [f"{_whom(ticket)}:\n\n    loractl join {ticket.line}\n" for ticket in answer.tickets]
    until = clock(answer.until, dt.datetime.now(dt.UTC))
    lines.append(f"Each line serves once, until {until}. More: loractl lab invite --box heron --person ada")
    if answer.only_here:
        lines.append(f"They lead to {answer.host}, which only this machine reaches: use --address for others.")
    return "\n".join(lines)


def _whom(ticket: JoinTicket) -> str:
    if ticket.kind == "box":
        return f"On {ticket.name or 'a GPU box'}, as root"
    return f"On the machine of {ticket.name}" if ticket.name else "On a person's machine"


def joined_lab(answer: JoinAnswer, screen: Screen) -> str:
    """The machine's name now, what doctor finds, and how the worker starts."""
    may = "runs jobs of" if answer.kind == "box" else "submits to"
    lines = [f"{answer.name} {may} the lab at {answer.host}. Its addresses: {answer.file}"]
    if answer.embedded is not None:
        lines.append(f"Earlier jobs stay in {answer.embedded}.")
    lines += ["", health(answer.diagnosis, screen), ""]
    if answer.service == "started":
        lines.append("The worker runs as a service: journalctl -u loractl-worker -f")
    elif answer.service == "installed" and answer.diagnosis.ok:
        lines.append("The service is installed; systemd does not run here: systemctl enable --now loractl-worker")
    elif answer.service == "installed":
        lines.append("Fix that, then start the worker: systemctl enable --now loractl-worker")
    elif answer.kind == "box":
        lines.append("Start the worker: loractl worker")
    else:
        lines.append("Queue a job: loractl submit job.yaml")
    return "\n".join(lines)
