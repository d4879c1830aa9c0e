"""Screens of every kind, fleets to draw on them, and what no drawing may do."""

from __future__ import annotations

from typing import Any

import click
import pytest

from loractl.common.store.fleet import FleetView
from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen

from ..fleets import card, drained, fleet, in_seconds, running, waits

SCREENS = [
    Screen(width=width, unicode=unicode, color=color)
    for width in (80, 120)
    for unicode in (True, False)
    for color in (True, False)
]
PIPE, WIDE = Screen(width=80, unicode=True, color=False), Screen(width=120, unicode=True, color=False)
ASCII = Screen(width=80, unicode=False, color=False)

HOSTILE = "\x1b[2Jgone\x07\r\x9b31m\u202etxt\nline"
NOTEBOOK = {"pid": 4711, "user": "jonas", "name": "notebook", "bytes": 10 * GIB}

shown = pytest.mark.parametrize(
    "screen", SCREENS, ids=lambda s: f"{s.width}-{'utf8' if s.unicode else 'ascii'}-{s.color}"
)


def lab(**changed: Any) -> FleetView:
    """The fleet of the design's picture of a terminal."""
    nodes = [
        card("kestrel:0", 24, device_name="NVIDIA GeForce RTX 4090", load=97, **changed),
        card("kestrel:1", 24, device_name="NVIDIA GeForce RTX 4090", load=88, outside_bytes=10, outside=[NOTEBOOK]),
        card("heron:0", 48, device_name="NVIDIA RTX A6000", load=99, max_jobs=4),
        card("heron:2", 48, device_name="NVIDIA RTX A6000"),
        card("merlin:0", 12, device_name="Tesla T4", seen_at=in_seconds(-7200)),
        card("osprey:0", 80, device_name="NVIDIA A100-SXM4-80GB", load=None, draining=True),
    ]
    ran = [
        running(1479, "kestrel:0", 17.8, 900, user="mara", eta_spread_seconds=120.0),
        running(1483, "kestrel:1", 11, None, user="priya"),
        running(1471, "heron:0", 30, 600, user="wei"),
        running(1484, "heron:0", 14, 1200, user="lena"),
    ]
    until = in_seconds(3 * 86400)
    return fleet(nodes, ran, [waits(1485, 30, 25)], [drained("heron:2", until=until)])


def crowded() -> FleetView:
    """Names and numbers as long as they can become, and text that would steer the terminal."""
    host = "a-very-long-name-of-a-box-in-some-data-centre.example.org"
    programs = [
        {"pid": 10**6 + n, "user": "somebody-with-a-long-name", "name": HOSTILE, "bytes": GIB} for n in range(9)
    ]
    nodes = [
        card(f"{host}:{n}", 9999, device_name="N" * 60, load=100, outside_bytes=100, outside=programs, max_jobs=64)
        for n in range(3)
    ]
    ran = [running(10**6 + n, f"{host}:{n % 2}", 100, 10**6, user=HOSTILE) for n in range(12)]
    orders = [drained(f"{host}:1", user=HOSTILE, reason="r" * 200)]
    return fleet(nodes, ran, [waits(10**6 + 99, 9000, 9000, user=HOSTILE, name="n" * 63)], orders)


def seemly(text: str, screen: Screen) -> None:
    """The text stays on its screen and steers nothing."""
    for line in text.splitlines():
        assert len(click.unstyle(line)) <= screen.width, f"{len(click.unstyle(line))} columns: {line!r}"
    assert screen.color or "\x1b" not in text
    assert screen.unicode or text.isascii()
    left = click.unstyle(text)
    assert all(c.isprintable() or c == "\n" for c in left)
