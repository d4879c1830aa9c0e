"""How cards, reasons and plans look: within the screen, in ASCII where it must be, without escapes in a pipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from loractl.common.job.method import Method
from loractl.common.memory.config import read_shape
from loractl.common.memory.correction import Measured, accuracy
from loractl.common.memory.plan import plan as memory_plan
from loractl.common.store.fleet import NODE_STALE_S, FleetView
from loractl.common.units import GIB
from loractl.scheduler.answers.why import Start, Tier, Wait, card_fits, explain
from loractl.scheduler.text import fleet as render_fleet
from loractl.scheduler.text.jobs import Screen

from ..factories import spec
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


# --- gpus ---


@shown
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("view", [lab, crowded])
def test_the_cards_fit_any_screen(view: Any, used: bool, screen: Screen) -> None:
    seemly(render_fleet.devices(view(), NODE_STALE_S, screen, used=used), screen)


def test_each_card_shows_its_memory_by_owner() -> None:
    lines = render_fleet.devices(lab(), NODE_STALE_S, PIPE).splitlines()
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
    lines = render_fleet.devices(lab(), NODE_STALE_S, WIDE).splitlines()
    assert lines[0].split()[:3] == ["CARD", "MODEL", "MEMORY"]
    (row,) = [line for line in lines if line.startswith("kestrel:0")]
    assert "NVIDIA GeForce RTX 40…" in row and "█" * 27 + "·" * 9 in row


def test_without_unicode_the_same_is_drawn_with_letters() -> None:
    text = render_fleet.devices(lab(), NODE_STALE_S, ASCII)
    assert "kestrel:1  xxxxxxxx#########...   3.0  24   88%  priya 1483, notebook of jonas" in text
    assert "--------------------" in text and "x outside loractl" in text


def test_what_jobs_really_hold_stands_beside_their_plans() -> None:
    view = lab(used={"1479": 12 * GIB})
    lines = render_fleet.devices(view, NODE_STALE_S, PIPE, used=True).splitlines()
    assert lines[0].split() == ["CARD", "MEMORY", "FREE", "USED", "OF", "LOAD", "USED", "BY"]
    (row,) = [line for line in lines if line.startswith("kestrel:0")]
    assert row.split()[2:5] == ["6.2", "12.0", "24"]


def test_who_holds_little_is_seen_all_the_same() -> None:
    view = fleet([card(total=80, outside_bytes=0.5, max_jobs=4)], [running(1, "box:0", 0.6)])
    assert "box:0  ▒█··················" in render_fleet.devices(view, NODE_STALE_S, PIPE)


def test_an_empty_fleet_says_what_to_do() -> None:
    assert render_fleet.devices(fleet([]), NODE_STALE_S, PIPE).endswith("loractl worker")


# --- why ---


def why(view: FleetView, screen: Screen, job: Any, start: Start | None = None, wait: Wait | None = None) -> str:
    ahead = "Ahead of it: 1486 (priya). Position 2 of 9."
    helps = [
        "It would start now on heron:3 with max_length 1536.  Try: loractl plan 1485 --set dataset.max_length=1536",
        "It would fit now on heron:3 without vllm of tomás.",
    ]
    return render_fleet.why(
        job, wait or explain(job, view), start, card_fits(job, view), ahead, helps, view.now, screen
    )


@shown
@pytest.mark.parametrize("view", [lab, crowded])
def test_a_reason_fits_any_screen(view: Any, screen: Screen) -> None:
    found = view()
    job = waits(10**6 + 99, 9000, 9000, name="n" * 63, user=HOSTILE) if view is crowded else waits(1485, 30, 25)
    node = list(found.cards)[-1]
    seemly(why(found, screen, job, Start(at=in_seconds(10**6), spread_s=86_400 * 3, node=node)), screen)
    seemly(why(found, screen, job, wait=Wait(tier=Tier.POLICY, word="held", sentence=HOSTILE * 40)), screen)


def test_a_reason_stands_before_the_cards_and_what_would_help_after_them() -> None:
    view, job = lab(), waits(1485, 30, 25, name="sql-gen")
    lines = why(view, PIPE, job, Start(at=in_seconds(600), spread_s=120.0, node="heron:0")).splitlines()
    assert lines[0] == "1485 sql-gen waits for 25.0 GiB on one card."
    assert lines[1] == "Reason: memory, heron:0 when 1471 ends."
    assert lines[2].startswith("Expected start: ") and lines[2].endswith(" ± 2 min on heron:0.")
    assert lines[4].split() == ["CARD", "FREE", "OF", "FREE", "AT", "THEN"]
    cards = {line[2:].split()[0]: line for line in lines[5:11]}
    assert cards["heron:0"].startswith("→ heron:0     4.0  48")
    assert cards["heron:0"].endswith("fits when 1471 ends")
    assert cards["kestrel:0"] == "  kestrel:0   6.2  24  never      card is smaller than the job"
    assert cards["osprey:0"].split(maxsplit=3)[3].endswith("its worker is stopping")
    assert lines[12] == "Ahead of it: 1486 (priya). Position 2 of 9."
    assert lines[13:] == [
        "It would start now on heron:3 with max_length 1536.  Try: loractl plan 1485",
        "--set dataset.max_length=1536",
        "It would fit now on heron:3 without vllm of tomás.",
    ]


def test_an_expected_start_that_is_not_known_says_so_unless_it_is_plain() -> None:
    view = lab()
    assert "Expected start: not known" in why(view, PIPE, waits(1485, 30, 25))
    assert "Expected start" not in why(view, PIPE, waits(1485, 300, 250)), "never is never"


def test_a_job_of_unknown_need_waits_for_a_card_of_its_own() -> None:
    assert why(lab(), PIPE, waits(1485, None, None)).startswith("1485 helpdesk waits for a card of its own.")


# --- plan ---


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, Any]:
    numbers = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    shape = read_shape(str(tmp_path))
    assert shape is not None
    return {
        method.value: memory_plan(shape, spec(base_model=str(tmp_path)), method)
        for method in Method
        if method is not Method.AUTO
    }


CARDS = [
    ("fits", "kestrel:0", "24", "with qlora, 6.2 GiB are free now"),
    (
        "tight",
        "a-very-long-name-of-a-box-in-some-data-centre.example.org:1",
        "24",
        "with qlora, once others have left it",
    ),
    ("never", "merlin:0", "12", "3.4 GiB short"),
]


@shown
def test_a_plan_fits_any_screen(plans: dict[str, Any], screen: Screen) -> None:
    title, lengths = (
        "t" * 60 + ".yaml",
        "Planned for rows of max_length, 1024 tokens: there is no tokenizer to count them with.",
    )
    solved = ["Largest in 24 GiB with lora: per_device_train_batch_size 1024, or max_length 16777216 tokens."]
    text = render_fleet.plan(title, plans, "qlora", [GIB, 2 * GIB], lengths, CARDS, solved, "Submit it: x", screen)
    seemly(text, screen)


def test_a_plan_shows_both_methods_part_by_part(plans: dict[str, Any]) -> None:
    text = render_fleet.plan("job.yaml", plans, "qlora", [10 * GIB, 11 * GIB], "Rows.", CARDS, [], "Submit it: x", PIPE)
    lines = text.splitlines()
    for method, one in plans.items():
        like = " (measured on 2 like it: 10.0 to 11.0)" if method == "qlora" else ""
        assert f"job.yaml with {method} needs {one.need_bytes / GIB:.1f} GiB{like}" in lines
    (weights,) = [line for line in lines if "parameters, bf16" in line]
    assert weights.split()[:2] == ["weights", f"{plans['lora'].parts['weights'] / GIB:.1f}"] and "█" * 12 in weights
    assert sum(line.lstrip().startswith("margin ") for line in lines) == 2
    assert lines[-1] == "Submit it: x"
    assert [line.split()[0] for line in lines if "kestrel:0" in line or "merlin:0" in line] == ["fits", "never"]


# --- accuracy ---


@shown
def test_the_table_of_accuracy_fits_any_screen(screen: Screen) -> None:
    runs = [
        Measured(
            device_name="NVIDIA H100 80GB HBM3 with a long name", method=method, family=family, need_key=None,
            planned=10 * GIB, reserved=10 * GIB, peak=int(peak * GIB), out_of_memory=False,
        )
        for method in (Method.LORA, Method.QLORA)
        for family in (None, "llama", "a_family_with_a_long_name")
        for peak in (9.1, 9.2, 9.3)
    ]  # fmt: skip
    text = render_fleet.accuracy_table(accuracy(runs), screen)
    seemly(text, screen)
    assert "0.92" in text and "0.94" in text
    assert render_fleet.accuracy_table([], screen).startswith("Nothing was measured")
