"""How cards, plans and reasons look on a terminal: functions from values to text."""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from loractl.common.text import clean_line
from loractl.common.units import GIB, duration, gib

from .jobs import Screen, bar, clock, fit, table

if TYPE_CHECKING:
    from loractl.common.memory.correction import Accuracy
    from loractl.common.memory.plan import Plan
    from loractl.common.placement.cards import Card
    from loractl.common.store.fleet import FleetView
    from loractl.common.store.tables import Job
    from loractl.scheduler.answers.why import CardFit, Start, Wait

NAME_COLUMNS = 20
"""Columns for the name of a card."""

ROOM_TO_WRAP = 24
"""Columns in which a wrapped sentence can still be read."""

_ASCII = str.maketrans({"–": "-", "…": "~", "→": ">", "±": "+-", "×": "x"})


def devices(view: FleetView, silent_after: float, screen: Screen, *, used: bool = False) -> str:
    """Every card, its memory by owner, and what uses it."""
    if not view.cards:
        return "No worker has reported a device yet. Start one on a GPU box: loractl worker"
    width = 20 if screen.width < 110 else 36
    wide = screen.width >= 110
    rows, colors = [], []
    for card in view.cards.values():
        node, color = view.nodes[card.node], "yellow"
        silent = (view.now - node.seen_at).total_seconds() > silent_after
        drained = view.drain_of(card.node)
        load = f"{node.load}%" if node.load is not None and not silent else "–"
        free = "–" if not card.open else gib(card.free)
        drawn = _memory_bar(card, width, screen, closed=not card.open)
        row = [screen.style(_card_name(card.node), bold=True), drawn, free, f"{card.total / GIB:.0f}", load]
        if used:
            held = sum(job.used for job in card.running)
            row.insert(3, gib(held) if held else "–")
        if silent:
            uses = f"not seen for {duration((view.now - node.seen_at).total_seconds())}"
        elif drained is not None:
            until = f" until {clock(drained.until, view.now)}" if drained.until else ""
            uses = f"drained by {drained.user}{until}: {drained.reason}"
        elif node.draining:
            uses = "its worker is stopping"
        else:
            uses, color = _users(card, view), ""
        colors.append(color)
        rows.append([row[0], fit(node.device_name, 22), *row[1:], uses] if wide else [*row, uses])
    headers = ["CARD", "MEMORY", "FREE", *(["USED"] if used else []), "OF", "LOAD", "USED BY"]
    headers = ["CARD", "MODEL", *headers[1:]] if wide else headers
    lines = _fitted(headers, rows, colors, screen, right=("FREE", "USED", "OF", "LOAD"))
    marks = "█ ▓ jobs, by plan   ▒ outside loractl   · free   ─ closed" if screen.unicode else ""
    marks = marks or "# = jobs, by plan   x outside loractl   . free   - closed"
    closing = "" if used else "  loractl gpus --used shows what jobs really hold."
    return _shown([*lines, "", screen.dim(marks), screen.dim(f"GiB.{closing}")], screen)


def _memory_bar(card: Card, width: int, screen: Screen, *, closed: bool) -> str:
    """Others first, then each job's part, then what is free; rounded so that nobody who holds something vanishes."""
    blocks = ("▒", "█", "▓", "·", "─") if screen.unicode else ("x", "#", "=", ".", "-")
    if closed and not card.running:
        return blocks[4] * width
    parts = [(blocks[0], card.outside)]
    parts += [(blocks[1 + n % 2], max(job.reserved, job.used)) for n, job in enumerate(card.running)]
    cells = "".join(mark * max(1, round(size / card.total * width)) for mark, size in parts if size >= card.total / 200)
    cells = cells[:width]
    return screen.style(cells, fg="blue") + blocks[3] * (width - len(cells))


def _users(card: Card, view: FleetView) -> str:
    from loractl.scheduler.answers.why import process_name

    jobs = [f"{job.user} {job.job_id}" for job in card.running]
    others = [process_name(p) for p in view.nodes[card.node].outside]
    if len(others) > 2:
        others = [*others[:2], f"{len(others) - 2} more"]
    return ", ".join([*jobs, *others]) or "–"


def why(
    job: Job,
    wait: Wait,
    start: Start | None,
    fits: Sequence[CardFit],
    ahead: str,
    helps: Sequence[str],
    now: dt.datetime,
    screen: Screen,
) -> str:
    """The reason in a sentence, every card, who is ahead, and what would help."""
    from loractl.scheduler.answers.why import Tier

    need = f"for {gib(job.vram_needed)} GiB on one card" if job.vram_needed is not None else "for a card of its own"
    lines = _wrapped(f"{job.job_id} {job.name} waits {need}.", f"{job.job_id} {job.name}", screen)
    lines += _wrapped(f"Reason: {wait.word}, {wait.sentence}.", wait.word, screen)
    if start is not None and start.at > now:
        spread = f" ± {duration(start.spread_s)}" if start.spread_s >= 1 else ""
        at = clock(start.at, now)
        lines += _wrapped(f"Expected start: {at}{spread} on {start.node}.", at, screen)
    elif wait.word not in ("never", "next"):
        hangs = ": the end of what runs or goes before it is not measured yet" if wait.tier is Tier.CAPACITY else ""
        lines += _wrapped(f"Expected start: not known{hangs}.", "", screen)
    if fits:
        best = start.node if start is not None else next((f.node for f in fits if f.when == "now"), None)
        arrow = "→" if screen.unicode else ">"
        rows = [
            [
                f"{arrow if fit_.node == best else ' '} {_card_name(fit_.node)}",
                gib(fit_.free),
                f"{fit_.total / GIB:.0f}",
                fit_.when,
                fit_.then,
            ]
            for fit_ in fits
        ]
        colors = ["green" if fit_.node == best else "" for fit_ in fits]
        headers = ["  CARD", "FREE", "OF", "FREE AT", "THEN"]
        lines += ["", *_fitted(headers, rows, colors, screen, right=("FREE", "OF"))]
    closing = [text for text in (ahead, *helps) if text]
    lines += [""] if closing else []
    for text in closing:
        lines += _wrapped(text, "", screen)
    return _shown(lines, screen)


def plan(
    title: str,
    plans: Mapping[str, Plan],
    choice: str | None,
    measured: Sequence[int],
    lengths: str,
    cards: Sequence[tuple[str, str, str, str]],
    solved: Sequence[str],
    next_command: str,
    screen: Screen,
) -> str:
    """Both methods' parts as bars, which cards hold the job, and what else would fit."""
    lines = []
    longest = max(size for one in plans.values() for size in (*one.parts.values(), one.margin_bytes))
    for n, (method, one) in enumerate(plans.items()):
        like = (
            f" (measured on {len(measured)} like it: {gib(min(measured))} to {gib(max(measured))})" if measured else ""
        )
        like = like if method == choice or len(plans) == 1 else ""
        size = f"{gib(one.need_bytes)} GiB"
        head = _wrapped(f"{title} with {method} needs {size}{like}", size, screen)
        lines += [*([""] if n else []), *head, ""]
        lines += _parts(one, longest, screen)
    lines += ["", *map(screen.dim, _wrapped(lengths, "", screen))]
    if cards:
        words = {"fits": "green", "tight": "yellow", "never": None}
        rows = [
            [screen.style(f"{word:<7}", fg=words.get(word)), _card_name(node), total, text]
            for word, node, total, text in cards
        ]
        lines += ["", *_fitted(["", "CARD", "OF", ""], rows, [""] * len(rows), screen, right=("OF",))]
    if solved:
        lines += ["", *(line for text in solved for line in _wrapped(text, "", screen))]
    return _shown([*lines, "", screen.dim(next_command)], screen)


def _parts(one: Plan, longest: int, screen: Screen) -> list[str]:
    """A bar for each part; `longest` bytes fill it, in every plan of one screen."""
    width = 12 if screen.width < 110 else 30
    parts = {**one.parts, "margin": one.margin_bytes}
    names = max(len(name.replace("_", " ")) for name in parts)
    lines = []
    for name, size in parts.items():
        if not size:
            continue
        drawn = bar(size / longest, width, screen).rstrip("·.")
        note = one.notes.get(name, "")
        line = f"  {name.replace('_', ' '):<{names}}  {gib(size):>6}  {drawn:<{width}}  {note}".rstrip()
        lines.append(fit(line, screen.width))
    return lines


def accuracy_table(found: Sequence[Accuracy], screen: Screen) -> str:
    """Predicted against measured, by device model, method and family."""
    if not found:
        return "Nothing was measured on a GPU yet: every attempt that ends there adds to this table."
    rows = [
        [
            fit(one.device_name, max(12, screen.width - 60)),
            one.method.value,
            fit(one.family or "–", 12),
            str(one.count),
            f"{one.ratio:.2f}",
            f"{one.spread:.2f}",
            f"{one.worst:.2f}",
            "–" if one.factor is None else f"{one.factor:.2f}",
        ]
        for one in found
    ]
    headers = ["DEVICE", "METHOD", "FAMILY", "RUNS", "MEAN", "SPREAD", "WORST", "FACTOR"]
    lines = table(headers, rows, screen, right=tuple(headers[3:]))
    notes = (
        "MEAN and WORST: measured over planned, the plan with its margin.",
        "With three runs or more, later plans are multiplied by FACTOR.",
    )
    return _shown([*lines, "", *map(screen.dim, notes)], screen)


def _fitted(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    colors: Sequence[str],
    screen: Screen,
    right: Sequence[str],
) -> list[str]:
    """A table whose last column goes over several lines where the screen is narrow, and is coloured."""
    plain_rows = [[click.unstyle(cell) for cell in row] for row in rows]
    taken = sum(max([len(h), *(len(row[n]) for row in plain_rows)]) + 2 for n, h in enumerate(headers[:-1]))
    room = screen.width - taken
    indent = taken if room >= ROOM_TO_WRAP else 4  # with little room it stands below its row
    parts = []
    for row in rows:
        text = clean_line(row[-1])
        below = textwrap.wrap(text, screen.width - indent, break_on_hyphens=False)
        parts.append([text] if len(text) <= room else below if indent == taken else ["", *below])
    first = [[*row[:-1], screen.style(part[0], fg=c or None)] for row, part, c in zip(rows, parts, colors, strict=True)]
    header, *lines = table(headers, first, screen, right=right)
    shown = [header]
    for line, part, color in zip(lines, parts, colors, strict=True):
        shown += [line, *(" " * indent + screen.style(rest, fg=color or None) for rest in part[1:])]
    return shown


def _card_name(node: str) -> str:
    """The card's name, a long one without its beginning: cards of one box differ at the end."""
    return node if len(node) <= NAME_COLUMNS else f"…{node[1 - NAME_COLUMNS :]}"


def _wrapped(text: str, bold: str, screen: Screen) -> list[str]:
    """The text in lines that the screen holds; its first `bold` is set off, where it is not broken."""
    text = clean_line(text) if screen.unicode else clean_line(text).translate(_ASCII)
    lines = textwrap.wrap(text, screen.width, break_on_hyphens=False) or [""]
    bold = clean_line(bold)
    if bold:
        lines[0] = lines[0].replace(bold, screen.style(bold, bold=True), 1)
    return lines


def _shown(lines: Sequence[str], screen: Screen) -> str:
    text = "\n".join(lines)
    return text if screen.unicode else text.translate(_ASCII).encode("ascii", "replace").decode()
