"""How cards, plans and reasons look on a terminal: functions from values to text."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loractl.common.units import GIB, duration, gib

from .render import Screen, bar, clock, fit, plain, table

if TYPE_CHECKING:
    from loractl.common.fleet import FleetView
    from loractl.common.learning import Accuracy
    from loractl.common.memory import Plan
    from loractl.common.policy import Card
    from loractl.common.tables import Job

    from .waiting import CardFit, Start, Wait

_FIT_COLORS = {"now": "green", "never": None, "?": "yellow"}


def devices(view: FleetView, silent_after: float, screen: Screen, *, used: bool = False) -> str:
    """Every card, its memory by owner, and what uses it."""
    if not view.cards:
        return "No worker has reported a device yet. Start one on a GPU box: loractl worker"
    width = 20 if screen.width < 110 else 36
    wide = screen.width >= 110
    rows = []
    for card in view.cards.values():
        node = view.nodes[card.node]
        silent = (view.now - node.seen_at).total_seconds() > silent_after
        drained = view.drain_of(card.node)
        load = f"{node.load}%" if node.load is not None and not silent else "–"
        free = "–" if not card.open else gib(card.free)
        drawn = _memory_bar(card, width, screen, closed=not card.open)
        row = [screen.style(card.node, bold=True), drawn, free, f"{card.total / GIB:.0f}", load]
        if used:
            held = sum(job.used for job in card.running)
            row.insert(3, gib(held) if held else "–")
        if silent:
            uses = screen.style(f"not seen for {duration((view.now - node.seen_at).total_seconds())}", fg="yellow")
        elif drained is not None:
            until = f" until {clock(drained.until, view.now)}" if drained.until else ""
            uses = screen.style(f"drained by {plain(drained.user)}{until}: {plain(drained.reason)}", fg="yellow")
        elif node.draining:
            uses = screen.style("its worker is stopping", fg="yellow")
        else:
            uses = _users(card, view, screen)
        rows.append([row[0], fit(node.device_name, 22), *row[1:], uses] if wide else [*row, uses])
    headers = ["CARD", "MEMORY", "FREE", *(["USED"] if used else []), "OF", "LOAD", "USED BY"]
    headers = ["CARD", "MODEL", *headers[1:]] if wide else headers
    lines = table(headers, rows, screen, right=("FREE", "USED", "OF", "LOAD"))
    lines = [line if len(line) <= screen.width or screen.color else fit(line, screen.width) for line in lines]
    marks = "█ ▓ jobs, by plan   ▒ outside loractl   · free   ─ closed" if screen.unicode else ""
    marks = marks or "# = jobs, by plan   x outside loractl   . free   - closed"
    closing = "" if used else "  loractl gpus --used shows what jobs really hold."
    return "\n".join([*lines, "", screen.dim(f"{marks}"), screen.dim(f"GiB.{closing}")])


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


def _users(card: Card, view: FleetView, screen: Screen) -> str:
    from .waiting import process_name

    jobs = [f"{plain(job.user)} {job.job_id}" for job in card.running]
    others = [plain(process_name(p)) for p in view.nodes[card.node].outside]
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
    from .waiting import Tier

    need = f"for {gib(job.vram_needed)} GiB on one card" if job.vram_needed is not None else "for a card of its own"
    lines = [screen.style(f"{job.job_id} {job.name}", bold=True) + f" waits {need}."]
    lines.append(f"Reason: {screen.style(wait.word, bold=True)}, {plain(wait.sentence)}.")
    if start is not None and start.at > now:
        spread = f" ± {duration(start.spread_s)}" if start.spread_s >= 1 else ""
        lines.append(f"Expected start: {screen.style(clock(start.at, now), bold=True)}{spread} on {start.node}.")
    elif wait.word not in ("never", "next"):
        hangs = ": the end of what runs or goes before it is not measured yet" if wait.tier is Tier.CAPACITY else ""
        lines.append(f"Expected start: not known{hangs}.")
    if fits:
        best = start.node if start is not None else next((f.node for f in fits if f.when == "now"), None)
        arrow = "→" if screen.unicode else ">"
        rows = [
            [
                f"{arrow if fit_.node == best else ' '} {fit_.node}",
                gib(fit_.free),
                f"{fit_.total / GIB:.0f}",
                fit_.when,
                screen.style(plain(fit_.then), fg="green" if fit_.node == best else None),
            ]
            for fit_ in fits
        ]
        lines += ["", *table(["  CARD", "FREE", "OF", "FREE AT", "THEN"], rows, screen, right=("FREE", "OF"))]
    lines += ["", ahead]
    lines += list(helps)
    return "\n".join(lines)


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
    for n, (method, one) in enumerate(plans.items()):
        like = (
            f" (measured on {len(measured)} like it: {gib(min(measured))} to {gib(max(measured))})" if measured else ""
        )
        like = like if method == choice or len(plans) == 1 else ""
        head = f"{title} with {method} needs {screen.style(f'{gib(one.need_bytes)} GiB', bold=True)}"
        lines += ([""] if n else []) + [head + like, ""]
        lines += _parts(one, screen)
    lines += ["", screen.dim(lengths)]
    if cards:
        words = {"fits": "green", "tight": "yellow", "never": None}
        rows = [
            [screen.style(f"{word:<7}", fg=words.get(word)), node, total, text] for word, node, total, text in cards
        ]
        lines += ["", *table(["", "CARD", "OF", ""], rows, screen, right=("OF",))]
    if solved:
        lines += ["", *solved]
    return "\n".join([*lines, "", screen.dim(next_command)])


def _parts(one: Plan, screen: Screen) -> list[str]:
    width = 12 if screen.width < 110 else 30
    parts = {**one.parts, "margin": one.margin_bytes}
    largest = max(parts.values()) or 1
    names = max(len(name.replace("_", " ")) for name in parts)
    lines = []
    for name, size in parts.items():
        if not size:
            continue
        drawn = bar(size / largest, width, screen).rstrip("·.")
        note = one.notes.get(name, "")
        lines.append(f"  {name.replace('_', ' '):<{names}}  {gib(size):>6}  {drawn:<{width}}  {note}".rstrip())
    return lines


def accuracy_table(found: Sequence[Accuracy], screen: Screen) -> str:
    """Predicted against measured, by device model, method and family."""
    if not found:
        return "Nothing was measured on a GPU yet: every attempt that ends there adds to this table."
    rows = [
        [
            fit(one.device_name, 28),
            one.method.value,
            one.family or "–",
            str(one.count),
            f"{one.ratio:.2f}",
            f"{one.spread:.2f}",
            f"{one.worst:.2f}",
            "–" if one.factor is None else f"{one.factor:.2f}",
        ]
        for one in found
    ]
    headers = ["DEVICE", "METHOD", "FAMILY", "RUNS", "MEASURED / PLAN", "SPREAD", "WORST", "PLANS ARE TIMES"]
    lines = table(headers, rows, screen, right=tuple(headers[3:]))
    note = "A plan includes its margin. With three runs or more, later plans are multiplied by the last column."
    return "\n".join([*lines, "", screen.dim(note)])
