"""The fleet on a terminal: every card, its memory by owner, and what uses it."""

from __future__ import annotations

import datetime as dt

from loractl.common.placement.cards import Card
from loractl.common.text import in_short
from loractl.common.units import GIB, clock, duration, gib
from loractl.scheduler.cli.screen import Screen, card_name, fit, joined, wrapped_table
from loractl.scheduler.wait.cards import process_name

from .answer import DeviceState, Fleet


def devices(fleet: Fleet, screen: Screen, *, used: bool = False) -> str:
    """Every card, its memory by owner, and what uses it."""
    if not fleet.devices:
        return "No worker is online. Start one on a GPU box: loractl worker"
    wide = screen.width >= 110
    headers = ["CARD", "MEMORY", "FREE", *(["USED"] if used else []), "OF", "LOAD", "USED BY"]
    headers = ["CARD", "MODEL", *headers[1:]] if wide else headers
    rows = [_row(device, fleet.now, screen, used=used) for device in fleet.devices]
    colors = ["" if _obstacle(device, fleet.now) is None else "yellow" for device in fleet.devices]
    lines = wrapped_table(headers, rows, colors, screen, right=("FREE", "USED", "OF", "LOAD"))
    marks = "█ ▓ jobs, by plan   ▒ outside loractl   · free   ─ closed" if screen.unicode else ""
    marks = marks or "# = jobs, by plan   x outside loractl   . free   - closed"
    closing = "GiB." if used else "GiB.  loractl gpus --used shows what jobs really hold."
    return joined([*lines, "", screen.dim(marks), screen.dim(closing)], screen)


def _row(device: DeviceState, now: dt.datetime, screen: Screen, *, used: bool) -> list[str]:
    card, wide = device.card, screen.width >= 110
    held = card.measured
    return [
        screen.style(card_name(card.node), bold=True),
        *([fit(device.row.device_name, 22)] if wide else []),
        _memory_bar(card, 36 if wide else 20, screen),
        gib(card.free) if card.open else "–",
        *([gib(held) if held else "–"] if used else []),
        f"{card.total / GIB:.0f}" if card.total else "?",
        "–" if device.row.load is None or device.silent_s is not None else f"{device.row.load}%",
        _obstacle(device, now) or _users(device, now),
    ]


def _memory_bar(card: Card, width: int, screen: Screen) -> str:
    """Others first, then each job's share, then what is free; rounded so that every held part is visible."""
    blocks = ("▒", "█", "▓", "·", "─") if screen.unicode else ("x", "#", "=", ".", "-")
    if not card.total or (not card.open and not card.running):
        return blocks[4] * width
    parts = [(blocks[0], card.outside)]
    parts += [(blocks[1 + n % 2], max(job.reserved, job.used)) for n, job in enumerate(card.running)]
    shares = [(mark, min(1.0, size / card.total)) for mark, size in parts]  # a row may report more than the card has
    cells = "".join(mark * max(1, round(share * width)) for mark, share in shares if share >= 1 / 200)[:width]
    return screen.style(cells, fg="blue") + blocks[3] * (width - len(cells))


def _obstacle(device: DeviceState, now: dt.datetime) -> str | None:
    """Why the card takes no jobs; None if it does."""
    if device.silent_s is not None:
        return f"not seen for {duration(device.silent_s)}"
    if device.row.fault is not None:
        return f"closed: {device.row.fault}"
    if (order := device.closed_by) is not None:
        until = f" until {clock(order.until, now)}" if order.until else ""
        return f"drained by {order.user}{until}: {order.reason}"
    return "its worker is stopping" if device.row.draining else None


def _users(device: DeviceState, now: dt.datetime) -> str:
    others = [process_name(process) for process in device.row.outside]
    if len(others) > 2:
        others = [*others[:2], f"{len(others) - 2} more"]
    failures = ", ".join(f"{count} {reason}" for reason, count in sorted(device.failures.items()))
    notes = [f"failed lately: {failures}"] if failures else []
    if device.card.contention is not None and device.card.max_jobs > 1:
        notes.append(f"jobs take {device.card.contention:.0%} longer for each other (measured)")
    notes += [] if device.row.until is None else [f"until {clock(device.row.until, now)}"]
    jobs = [
        f"{job.user} {job.job_id}" + (f" on {in_short(cards)}" if len(cards := device.cards_of(job.job_id)) > 1 else "")
        for job in device.card.running
    ]
    return ", ".join([*jobs, *others, *notes]) or "–"
