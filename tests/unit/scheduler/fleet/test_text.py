"""How the cards look: within the screen, in ASCII where it must be, without escapes in a pipe."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest

from loractl.common.job.status import Reason
from loractl.common.placement.closure import CardFailure
from loractl.common.store.tables import Node
from loractl.common.units import GIB, clock
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.fleet.answer import fleet_of
from loractl.scheduler.fleet.text import devices

from ...factories import NOON
from ...fleets import card, fleet, running
from ..screens import ASCII, PIPE, WIDE, crowded, lab, seemly, shown


@shown
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("view", [lab, crowded])
def test_the_cards_fit_any_screen(view: Any, used: bool, screen: Screen) -> None:
    seemly(devices(fleet_of(view()), screen, used=used), screen)


def test_each_card_shows_its_memory_by_owner() -> None:
    lines = devices(fleet_of(lab()), PIPE).splitlines()
    assert lines[0] == "CARD       MEMORY                FREE  OF  LOAD  USED BY"
    rows = {line.split()[0]: line for line in lines[1:8]}
    assert any(line.startswith(" " * 49) for line in lines[1:8]), "a long reason goes on below, it is not cut"
    assert rows["kestrel:0"] == "kestrel:0  ███████████████·····   6.2  24   97%  mara 1479"
    assert rows["kestrel:1"] == "kestrel:1  ▒▒▒▒▒▒▒▒█████████···   3.0  24   88%  priya 1483, notebook of jonas"
    assert rows["heron:0"] == "heron:0    ████████████▓▓▓▓▓▓··   4.0  48   99%  wei 1471, lena 1484"
    assert rows["heron:2"].startswith("heron:2    ────────────────────     –  48     –  drained by lena until")
    assert rows["merlin:0"] == "merlin:0   ────────────────────     –  12     –  not seen for 2 h 00 min"
    assert rows["osprey:0"].endswith("its worker is stopping")
    assert "▒ outside loractl" in lines[9]


def test_a_wide_screen_shows_the_models_too() -> None:
    lines = devices(fleet_of(lab()), WIDE).splitlines()
    assert lines[0].split()[:3] == ["CARD", "MODEL", "MEMORY"]
    (row,) = [line for line in lines if line.startswith("kestrel:0")]
    assert "NVIDIA GeForce RTX 40…" in row and "█" * 27 + "·" * 9 in row


def test_without_unicode_the_same_is_drawn_with_letters() -> None:
    text = devices(fleet_of(lab()), ASCII)
    assert "kestrel:1  xxxxxxxx#########...   3.0  24   88%  priya 1483, notebook of jonas" in text
    assert "--------------------" in text and "x outside loractl" in text


def test_what_jobs_really_hold_stands_beside_their_plans() -> None:
    view = lab(used={"1479": 12 * GIB})
    lines = devices(fleet_of(view), PIPE, used=True).splitlines()
    assert lines[0].split() == ["CARD", "MEMORY", "FREE", "USED", "OF", "LOAD", "USED", "BY"]
    (row,) = [line for line in lines if line.startswith("kestrel:0")]
    assert row.split()[2:5] == ["6.2", "12.0", "24"]


def test_who_holds_little_is_seen_all_the_same() -> None:
    view = fleet([card(total=80, outside_bytes=0.5, max_jobs=4)], [running(1, "box:0", 0.6)])
    assert "box:0  ▒█··················" in devices(fleet_of(view), PIPE)


def test_a_row_that_tells_a_card_of_one_byte_draws_no_longer_bar() -> None:
    """A row of a box's login may hold anything: a mark for each of its bytes would be 300 GB of text."""
    view = fleet([card(total=1 / GIB, max_jobs=4)], [running(1, "box:0", 8)])
    assert devices(fleet_of(view), PIPE).splitlines()[1].startswith("box:0  " + 20 * "█" + "  ")


def test_a_card_that_closed_itself_says_why_and_what_to_do() -> None:
    view = fleet([card(fault="it is lost: reset it"), card("box:1", 0, fault="reboot the box")])
    rows = devices(fleet_of(view), PIPE).splitlines()
    assert rows[1] == "box:0  ────────────────────     –  24     –  closed: it is lost: reset it"
    assert rows[2] == "box:1  ────────────────────     –   ?     –  closed: reboot the box"


def test_an_empty_fleet_says_what_to_do() -> None:
    assert devices(fleet_of(fleet([])), PIPE).endswith("loractl worker")


def test_a_device_as_json_has_all_that_its_node_told() -> None:
    columns = [column.key for column in Node.__table__.columns]
    (told,) = fleet_of(fleet([card()])).as_json()
    assert list(told) == [*columns, "reserved", "open", "jobs", "contention", "drained", "failures"]
    assert told["failures"] == {}


def test_failures_of_the_lab_are_counted_until_a_job_ends_well_there() -> None:
    view = fleet([card("a:0"), card("b:0")], [running(1, "a:0", 8)])
    reasons = (Reason.GPU_ERROR, Reason.WORKER_LOST, Reason.WORKER_LOST)
    failures = tuple(
        CardFailure(node="a:0", reason=reason, user="ada", job_id=n, sweep_id=None, at=NOON, message="")
        for n, reason in enumerate(reasons)
    )
    found = fleet_of(replace(view, failures=failures))
    rows = {line.split()[0]: line for line in devices(found, WIDE).splitlines()[1:3]}
    assert rows["a:0"].endswith("ada 1, failed lately: 1 gpu_error, 2 worker_lost")
    assert rows["b:0"].endswith("–")
    assert [device["failures"] for device in found.as_json()] == [{"gpu_error": 1, "worker_lost": 2}, {}]


def test_a_card_whose_worker_stops_says_until_when() -> None:
    until = NOON + dt.timedelta(hours=2)
    answer = fleet_of(fleet([card("a:0", until=until, window_s=4 * 3600.0), card("b:0")]))
    rows = {line.split()[0]: line for line in devices(answer, PIPE).splitlines()[1:3]}
    assert rows["a:0"].endswith(f"–  until {clock(until, NOON)}") and rows["b:0"].endswith("–  –")
    assert [one["until"] for one in answer.as_json()] == [until.isoformat(), None]
