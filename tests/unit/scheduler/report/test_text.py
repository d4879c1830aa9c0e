"""How a report looks: the verdict, its tables, the answers side by side, and nothing that steers the terminal."""

from __future__ import annotations

import re
from typing import Any

import click
import pytest

from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.report.text import report_text

from ..screens import shown

PLAIN = Screen(width=80, unicode=True, color=False)
ASCII = Screen(width=80, unicode=False, color=False)
COLOR = Screen(width=80, unicode=True, color=True)

HOSTILE = "\x1b[2Jgone\x07\r\x9b31m\u202etxt"
"""Clears the screen, rings, overwrites the line, colours (one-byte CSI) and turns the reading direction round."""


def report(answers: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    metric = {
        "label": "ROUGE-L", "unit": "", "base": 0.2, "tuned": 0.61, "change": 0.41, "low": 0.3, "high": 0.5,
        "reading": "better",
    }  # fmt: skip
    exact = {**metric, "label": "exact", "unit": "%", "base": 50.0, "tuned": None, "change": -2.5, "reading": "worse"}
    return {
        "job": {"job_id": 7, "name": "helpdesk"},
        "verdict": {"sentence": "the tuned model is better"},
        "method": "qlora",
        "training": {
            "tokens_per_second": 800.0, "steps": 32, "resumed_from_step": None,
            "seconds": 100, "peak_memory_bytes": 6 * GIB,
            "peak_memory_kind": "CUDA",
        },
        "data": {"truncated_rows": 1, "too_long_rows_dropped": 2, "bad_rows_dropped": 3},
        "evaluation": {
            "rows": 12, "metrics": [metric, exact], "bootstrap": {"samples": 2000, "seed": 0}, "answers": answers or [],
        },
    }  # fmt: skip


def answer(row: int, base: bool, tuned: bool, text: str = "text") -> dict[str, Any]:
    return {
        "row": row, "prompt": text, "expected": text, "base": text, "tuned": text,
        "base_exact": base, "tuned_exact": tuned,
    }  # fmt: skip


@pytest.mark.parametrize("screen", [PLAIN, ASCII, COLOR])
def test_escapes_are_written_only_where_there_is_colour(screen: Screen) -> None:
    text = report_text(report([answer(1, False, True)]), screen, 3)
    assert ("\x1b" in text) == screen.color
    assert screen.unicode or not set(text) & set("█▏▎▍▌▋▊▉·▁▂▃▄▅▆▇✓✗")


def test_the_report_shows_the_verdict_the_table_and_what_was_repaired_first() -> None:
    answers = [answer(1, True, True), answer(2, True, False), answer(3, False, True), answer(4, False, False)]
    text = report_text(report(answers), PLAIN, 3)
    assert text.startswith("7 helpdesk: the tuned model is better\n")
    assert re.search(r"ROUGE-L +0\.20 +0\.61 +\+0\.41 +\+0\.30 to \+0\.50 +better", text)
    assert re.search(r"exact, % +50\.0 +– +−2\.5", text)
    assert "1 row truncated, 5 left out." in text
    assert re.findall(r"^Row (\d)", text, re.M) == ["3", "2", "1"]
    assert "base (wrong): text\n  tuned (right): text" in text
    assert text.endswith("1 more answer: loractl report 7 --answers 4")


@shown
def test_every_line_but_an_answer_s_stays_on_the_screen(screen: Screen) -> None:
    value = report()
    own = {"label": "answers that end by themselves", "unit": "%", "base": 33.3, "low": -129.66, "high": -59.89}
    value["evaluation"]["metrics"].append(
        {**value["evaluation"]["metrics"][0], **own, "reading": "no practical change"}
    )
    value["evaluation"] |= {
        "baseline": "the most frequent label of the training rows is right in 61.0 % of the held-out rows",
        "labels": {"names": ["a label whose name is a sentence"] * 3, "base": [[9] * 3] * 3, "tuned": [[9] * 3] * 3},
    }
    value["verdict"]["sentence"] = value["verdict"]["aside"] = "held-out loss 4.49 -> 0.25, and so on; " * 4
    lines = click.unstyle(report_text(value, screen, 1, "final rows: " * 20)).splitlines()
    assert all(len(line) <= screen.width for line in lines), lines
    assert screen.width > 80 or "  themselves, %" in lines, "the unit stays with its last word"


def test_figures_of_the_base_that_an_earlier_job_measured_are_named_as_such() -> None:
    own, used = report(), report()
    assert "job 5" not in report_text(own, PLAIN, 0)
    used["evaluation"] |= {
        "base_measured_by_job": 5, "base_measured_at": "2026-01-14T12:00:00+00:00", "base_rows_measured_again": 8,
    }  # fmt: skip
    told = " ".join(report_text(used, PLAIN, 0).split())
    assert "The base's figures are those that job 5 measured on this box on 2026-01-14; checked on 8 rows." in told


def test_labels_and_turns_are_tables_of_their_own() -> None:
    value = report()
    value["evaluation"] |= {
        "labels": {"names": ["gpu", HOSTILE, "other"], "base": [[1, 2, 1], [0] * 3, [0] * 3],
                   "tuned": [[2, 2, 0], [0] * 3, [0] * 3]},
        "turns": [{"turn": 2, "cases": 5, "base": 3.125, "tuned": None}],
    }  # fmt: skip
    text = report_text(value, PLAIN, 1)
    assert re.search(r"^LABEL +ROWS +BASE RIGHT +TUNED RIGHT +TUNED SAID INSTEAD\ngpu +4 +1 +2 +\S", text, re.M)
    assert re.search(r"^ANSWER +CASES +BASE LOSS +TUNED LOSS\n +2 +5 +3\.12 +–", text, re.M)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_the_harness_s_numbers_are_a_table_that_says_which_intervals_are_not_in_pairs() -> None:
    number = {
        "label": "arc_easy acc", "group": None, "interval": "paired", "base": 0.25, "tuned": 0.5, "change": 0.25,
        "base_stderr": 0.0436, "tuned_stderr": 0.05, "low": 0.125, "high": 0.375, "reading": "better",
    }  # fmt: skip
    average = {**number, "label": HOSTILE, "interval": "unpaired", "reading": "no clear change"}
    unknown = {**number, "interval": "none", "base_stderr": None, "low": None, "high": None, "reading": "not known"}
    value = report()
    value["evaluation"]["lm_eval"] = {
        "version": "0.4.13", "limit": 1000, "metrics": [number, average, unknown, {**number, "group": "g"}]
    }  # fmt: skip
    text = report_text(value, PLAIN, 1)
    assert re.search(
        r"arc_easy acc +0\.250 \(0\.044\) +0\.500 \(0\.050\) +\+0\.250 +\+0\.125 to \+0\.375 +better", text
    )
    assert re.search(r"\+0\.125 to \+0\.375 \* +no clear change", text)
    assert re.search(r"arc_easy acc +0\.250 +0\.500 \(0\.050\) +\+0\.250 +– to – +not known", text)
    assert "lm_eval 0.4.13, at most 1 000 rows of each task" in text and "; * unpaired" in text
    assert "1 more numbers" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    value["evaluation"]["lm_eval"] |= {"limit": None, "metrics": [number]}
    assert "all rows of each task" in (few := report_text(value, PLAIN, 1)) and "unpaired" not in few


def test_an_answer_of_several_lines_is_indented_and_an_empty_one_is_named() -> None:
    shown = report_text(report([{**answer(1, False, True), "base": "", "tuned": "one\ntwo"}]), PLAIN, 1)
    assert "base (wrong): (nothing)" in shown
    assert "tuned (right): one\n    two" in shown


def test_control_characters_of_a_models_answer_never_reach_the_terminal() -> None:
    shown = report_text(report([answer(1, False, True, HOSTILE)]), PLAIN, 1)
    assert "gone" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


@pytest.mark.parametrize(
    ("resumed", "beside", "words"),
    [
        (None, [], "20 steps in"), (11, [], "20 steps, the last 9 of them in"),
        (None, [4], "20 steps alongside job 4 in"),
        (11, [4, 5], "20 steps alongside jobs 4, 5, the last 9 of them in"),
    ],
)  # fmt: skip
def test_the_steps_name_what_a_resumed_training_s_time_covers_and_who_was_beside_it(
    resumed: int | None, beside: list[int], words: str
) -> None:
    value = report()
    value["training"] |= {"steps": 20, "resumed_from_step": resumed, "companions": beside}
    assert words in report_text(value, PLAIN, 0)
