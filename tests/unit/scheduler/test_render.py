"""What the terminal shows: widths, ASCII, no escapes without colour, and nothing that steers the terminal."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.status import Reason, Stage, Status
from loractl.common.store.tables import Attempt, Event, Job, MetricPoint
from loractl.common.units import GIB
from loractl.scheduler.answers.adapters import AdapterList, StoredAdapter
from loractl.scheduler.answers.why import Tier, Wait
from loractl.scheduler.text import jobs as render
from loractl.scheduler.text.adapters import adapters_text
from loractl.scheduler.text.jobs import JSON_FIELDS, Screen, bar, clock, fit, sparkline, table

from ..factories import NOON, job

PLAIN = Screen(width=80, unicode=True, color=False)
ASCII = Screen(width=80, unicode=False, color=False)
COLOR = Screen(width=80, unicode=True, color=True)
WIDE = Screen(width=120, unicode=True, color=False)

HOSTILE = "\x1b[2Jgone\x07\r\x9b31m\u202etxt"
"""Clears the screen, rings, overwrites the line, colours (one-byte CSI) and turns the reading direction round."""


def running(**changed: Any) -> Any:
    values = {
        "status": Status.RUNNING, "stage": Stage.TRAINING, "node": "box:0", "method": "qlora", "attempt": 1, "step": 30,
        "total_steps": 1584, "loss": 1.234, "eta_seconds": 600.0, "tokens_per_second": 812.4,
    }  # fmt: skip
    return job(**{**values, **changed})


def largest_running() -> Any:
    return running(
        job_id=1234, name="a" * 63, user="somebody-long", node="a-long-host-name:12",
        stage=Stage.EVALUATING, loss=12.345, base_model="org/" + "m" * 60,
    )  # fmt: skip


def attempt(**changed: Any) -> Attempt:
    values = {
        "job_id": 7, "attempt": 1, "token": "secret-token", "node": "box:0", "gpu": "GPU-1", "method": "qlora",
        "vram_planned": 8 * GIB, "vram_peak": 6 * GIB, "started_at": NOON, "ended_at": NOON + dt.timedelta(minutes=5),
        "reason": Reason.TRAINER_ERROR, "resumed_from_step": 16,
    }  # fmt: skip
    return Attempt(**{**values, **changed})


def event(text: str, minute: int = 0) -> Event:
    return Event(job_id=7, attempt=1, at=NOON + dt.timedelta(minutes=minute), kind="note", text=text)


def wait(word: str, sentence: str) -> Wait:
    return Wait(tier=Tier.CAPACITY, word=word, sentence=sentence)


def overview(ran: list[Job], waiting: dict[Job, Wait], ended: list[Job], screen: Screen) -> str:
    reasons = {job.job_id: reason for job, reason in waiting.items()}
    return render.overview(ran, list(waiting), reasons, {}, ended, NOON, screen)


def point(step: int, value: float) -> MetricPoint:
    return MetricPoint(job_id=7, attempt=1, step=step, name="loss", value=value)


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


@given(st.floats(-1, 2), st.integers(1, 60), st.booleans())
def test_a_bar_always_has_the_width_that_it_was_given(share: float, width: int, unicode: bool) -> None:
    screen = PLAIN if unicode else ASCII
    drawn = bar(share, width, screen)
    assert len(drawn) == width
    assert unicode or set(drawn) <= {"#", "."}


def test_a_bar_grows_in_eighths_and_is_full_only_at_the_end() -> None:
    assert [bar(share, 2, PLAIN) for share in (0, 1 / 16, 0.5, 1)] == ["··", "▏·", "█·", "██"]
    assert [bar(share, 4, ASCII) for share in (0, 0.5, 0.99, 1)] == ["....", "##..", "###.", "####"]


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 60))
def test_a_sparkline_fits_its_width_and_spans_its_values(values: list[float], width: int) -> None:
    drawn = sparkline(values, width, PLAIN)
    assert len(drawn) == min(width, len(values))
    if len(values) <= width and len(set(values)) > 1:
        assert drawn[values.index(min(values))] == "▁"
        assert drawn[values.index(max(values))] == "█"


def test_a_sparkline_of_a_flat_value_or_in_ascii_is_quiet() -> None:
    assert sparkline([2.0, 2.0], 30, PLAIN) == "▁▁"
    assert sparkline([1.0, 2.0], 30, ASCII) == sparkline([], 30, PLAIN) == ""


def test_a_table_is_aligned_by_what_is_seen_not_by_its_escapes() -> None:
    styled = [["1", COLOR.style("red", fg="red"), "x"], ["10", "green", "y"]]
    lines = [click.unstyle(line) for line in table(["N", "COLOR", "Z"], styled, COLOR, right=("N",))]
    assert lines == [" N  COLOR  Z", " 1  red    x", "10  green  y"]
    assert table(["N", "COLOR"], [], PLAIN) == ["N  COLOR"]


@given(st.text(max_size=50), st.integers(1, 40))
def test_a_fitted_text_is_one_printable_line_of_at_most_the_width(text: str, width: int) -> None:
    shown = fit(text, width)
    assert len(shown) <= max(width, 2)
    assert shown == "" or shown.isprintable()


def test_a_moment_is_as_short_as_its_age_allows() -> None:
    local = NOON.astimezone()
    assert clock(None, NOON) == "–"
    assert clock(NOON, NOON) == local.strftime("%H:%M")
    assert clock(NOON, NOON + dt.timedelta(days=2)) == local.strftime("%a %H:%M")
    assert clock(NOON, NOON + dt.timedelta(days=40)) == local.strftime("%d %b")


def test_the_json_of_a_job_has_the_columns_names_and_plain_values() -> None:
    fields = render.job_fields(running(ended_at=NOON, labels={"a": "b"}))
    assert tuple(fields) == JSON_FIELDS
    loaded = json.loads(json.dumps(fields))
    assert (loaded["status"], loaded["stage"], loaded["labels"]) == ("running", "training", {"a": "b"})
    assert dt.datetime.fromisoformat(loaded["ended_at"]) == NOON
    assert "token" not in fields


def test_the_overview_tells_what_runs_what_waits_and_how_the_day_went() -> None:
    ended = [job(status=Status.SUCCEEDED), job(status=Status.FAILED), job(status=Status.CANCELLED)]
    text = overview([running()], {job(job_id=8): wait("busy", "box:0 runs 7")}, ended, PLAIN)
    assert text.startswith("1 running, 1 waiting.")
    assert re.search(r"7  helpdesk +ada +box:0 .* 2% .* 1\.23", text)
    assert re.search(r"8  helpdesk +ada +8\.0  busy +box:0 runs 7", text)
    assert "Today 1 ✓ 1 ✗" in text
    assert "Today 1 ok 1 failed" in overview([], {}, ended, ASCII)
    assert "Submit one: loractl submit job.yaml" in overview([], {}, [], PLAIN)


@pytest.mark.parametrize("width", [80, 110, 120])
def test_the_largest_values_stay_within_the_screen(width: int) -> None:
    screen = Screen(width=width, unicode=True, color=False)
    ended = job(
        job_id=1234, name="a" * 63, user="somebody-long", status=Status.FAILED, reason=Reason.HOST_OUT_OF_MEMORY,
        message="word " * 60, ended_at=NOON, method="qlora",
    )  # fmt: skip
    texts = [
        overview([largest_running()], {}, [], screen),
        overview([], {job(name="b" * 63, user="somebody-long"): wait("memory", "sentence " * 30)}, [], screen),
        render.all_jobs([ended], {}, NOON + dt.timedelta(days=2), screen),
    ]
    assert [line for text in texts for line in text.splitlines() if len(line) > width] == []


def test_a_wide_screen_shows_the_model_and_the_method_as_well() -> None:
    assert "model-135M qlora" in overview([running()], {}, [], WIDE)
    assert "model-135M" not in overview([running()], {}, [], PLAIN)


@pytest.mark.parametrize("screen", [PLAIN, ASCII, COLOR])
def test_escapes_are_written_only_where_there_is_colour_and_ascii_draws_no_blocks(screen: Screen) -> None:
    losses = [point(1, 3.0), point(2, 1.0)]
    texts = [
        overview([running()], {job(): wait("busy", "x")}, [], screen),
        render.all_jobs([running(), job(status=Status.FAILED, reason=Reason.DIVERGED, message="m")], {}, NOON, screen),
        render.one_job(running(), [attempt()], [event("started")], losses, [], None, NOON, screen),
        render.history(running(), [attempt()], [event("started")], "name: a", NOON, screen),
        render.report_text(report([answer(1, False, True)]), screen, 3),
    ]
    for text in texts:
        assert ("\x1b" in text) == screen.color
        assert screen.unicode or not set(text) & set("█▏▎▍▌▋▊▉·▁▂▃▄▅▆▇✓✗")


def test_a_running_job_in_full_shows_its_place_course_and_next_command() -> None:
    losses, evals = [point(1, 3.0), point(30, 1.234)], [point(20, 1.5)]
    text = render.one_job(
        running(), [attempt(ended_at=None)], [event("a"), event("b", 1)], losses, evals, None, NOON, PLAIN
    )
    lines = text.splitlines()
    assert lines[0] == "7 helpdesk on box:0, attempt 1, training"
    assert lines[2].endswith("   2%  30 of 1 584  10 min left")
    assert "loss    █▁  1.23   held out 1.50 at step 20" in lines
    assert "memory  6.0 GiB at most, planned 8.0 GiB   method qlora   speed 812 tok/s" in lines
    assert text.index("  b") < text.index("  a\n"), "the newest event first"
    assert lines[-1] == "Its log: loractl logs 7 -f   stop it: loractl cancel 7"
    assert max(map(len, lines)) <= 80


def test_a_job_that_waits_failed_or_succeeded_says_why_and_what_to_do_next() -> None:
    def full(row: Any, waits: Wait | None = None) -> list[str]:
        return render.one_job(row, [], [], [], [], waits, NOON, PLAIN).splitlines()

    assert full(job(), wait("worker", "no worker is online"))[0] == "7 helpdesk waits: worker, no worker is online."
    failed = full(job(status=Status.FAILED, reason=Reason.DISK_FULL, message="no space"))
    assert failed[0] == "7 helpdesk failed (disk_full): no space"
    assert failed[-1] == "Next: free space on the worker's disk, then loractl retry 7."
    done = full(
        job(status=Status.SUCCEEDED, reason=Reason.OK, message="done", adapter_uri="s3://a", report_uri="s3://r")
    )
    assert "adapter s3://a" in done
    assert done[-1] == "Its report: loractl report 7   its adapter: loractl adapters pull 7 DIR"


def test_the_history_lists_every_attempt_with_how_it_ended_and_no_token() -> None:
    again = attempt(attempt=2, ended_at=None, reason=None, vram_peak=None, resumed_from_step=None)
    text = render.history(running(), [attempt(), again], [event("started")], "name: a\n", NOON, PLAIN)
    assert re.search(r"1  box:0  qlora +8\.0 +6\.0 .*5 min  trainer_error  step 16", text)
    assert re.search(r"2  box:0  qlora +8\.0 +– .*runs$", text, re.M)
    assert text.endswith("spec:\nname: a")
    assert "secret-token" not in text


def test_the_adapters_are_listed_with_the_command_that_fetches_one() -> None:
    stored = StoredAdapter(
        job_id=7, attempt=1, name="helpdesk", base_model="org/model", method="lora", uri="s3://a", size=3_500_000,
        sha256="0", created_at=NOON, tags=("latest", "prod"),
    )  # fmt: skip
    text = adapters_text(AdapterList(adapters=(stored,), now=NOON), PLAIN)
    assert re.search(r"7  helpdesk  latest, prod  lora +3\.5 .* model$", text, re.M)
    assert text.endswith("Use one: loractl adapters pull 7 DIR")
    assert adapters_text(AdapterList(adapters=(), now=NOON), PLAIN).startswith("No adapter is stored yet")


def test_the_report_shows_the_verdict_the_table_and_what_was_repaired_first() -> None:
    answers = [answer(1, True, True), answer(2, True, False), answer(3, False, True), answer(4, False, False)]
    text = render.report_text(report(answers), PLAIN, 3)
    assert text.startswith("7 helpdesk: the tuned model is better\n")
    assert re.search(r"ROUGE-L +0\.20 +0\.61 +\+0\.41 +\+0\.30 to \+0\.50 +better", text)
    assert re.search(r"exact, % +50\.0 +– +−2\.5", text)
    assert "1 rows truncated, 5 left out." in text
    assert re.findall(r"^Row (\d)", text, re.M) == ["3", "2", "1"]
    assert "base (wrong): text\n  tuned (right): text" in text
    assert text.endswith("1 more answers: loractl report 7 --answers 4")


def test_labels_and_turns_are_tables_of_their_own() -> None:
    value = report()
    value["evaluation"] |= {
        "labels": {"names": ["gpu", HOSTILE, "other"], "base": [[1, 2, 1], [0] * 3, [0] * 3],
                   "tuned": [[2, 2, 0], [0] * 3, [0] * 3]},
        "turns": [{"turn": 2, "cases": 5, "base": 3.125, "tuned": None}],
    }  # fmt: skip
    text = render.report_text(value, PLAIN, 1)
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
    text = render.report_text(value, PLAIN, 1)
    assert re.search(
        r"arc_easy acc +0\.250 \(0\.044\) +0\.500 \(0\.050\) +\+0\.250 +\+0\.125 to \+0\.375 +better", text
    )
    assert re.search(r"\+0\.125 to \+0\.375 \* +no clear change", text)
    assert re.search(r"arc_easy acc +0\.250 +0\.500 \(0\.050\) +\+0\.250 +– to – +not known", text)
    assert "lm_eval 0.4.13, at most 1 000 rows of each task" in text and "; * unpaired" in text
    assert "1 more numbers" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    value["evaluation"]["lm_eval"] |= {"limit": None, "metrics": [number]}
    assert "all rows of each task" in (few := render.report_text(value, PLAIN, 1)) and "unpaired" not in few


def test_an_answer_of_several_lines_is_indented_and_an_empty_one_is_named() -> None:
    shown = render.report_text(report([{**answer(1, False, True), "base": "", "tuned": "one\ntwo"}]), PLAIN, 1)
    assert "base (wrong): (nothing)" in shown
    assert "tuned (right): one\n    two" in shown


def test_control_characters_of_a_models_answer_never_reach_the_terminal() -> None:
    shown = render.report_text(report([answer(1, False, True, HOSTILE)]), PLAIN, 1)
    assert "gone" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_control_characters_of_messages_events_and_names_never_reach_the_terminal() -> None:
    bad = f"{HOSTILE}\nsecond"
    failed = job(status=Status.FAILED, reason=Reason.TRAINER_ERROR, message=bad, user=HOSTILE)
    ran = running(user=HOSTILE, base_model=HOSTILE)
    texts = [
        render.one_job(failed, [], [event(bad)], [], [], None, NOON, PLAIN),
        render.one_job(job(), [], [], [], [], wait("held", bad), NOON, PLAIN),
        render.all_jobs([failed], {}, NOON, PLAIN),
        overview([ran], {failed: wait("held", bad)}, [], WIDE),
        render.history(failed, [], [event(bad)], "name: a", NOON, PLAIN),
    ]
    for text in texts:
        assert all(c.isprintable() or c == "\n" for c in text)
    assert len(texts[2].splitlines()) == 2, "a message of two lines does not break the table"


@pytest.mark.parametrize(("resumed", "words"), [(None, "20 steps in"), (11, "20 steps, the last 9 of them in")])
def test_the_time_of_a_resumed_training_names_the_steps_that_it_covers(resumed: int | None, words: str) -> None:
    value = report()
    value["training"] |= {"steps": 20, "resumed_from_step": resumed}
    assert words in render.report_text(value, PLAIN, 0)
