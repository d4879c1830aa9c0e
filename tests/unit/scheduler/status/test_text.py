"""What the terminal shows: widths, ASCII, no escapes without colour, and nothing that steers the terminal."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from loractl.common.job.status import Reason, Stage, Status
from loractl.common.store.tables import Attempt, AttemptShare, Event, Job
from loractl.common.units import GIB
from loractl.scheduler.adapters.answer import AdapterList, StoredAdapter
from loractl.scheduler.adapters.text import adapters_text
from loractl.scheduler.cli.screen import Screen, in_height
from loractl.scheduler.status.job import (
    JSON_FIELDS,
    JobInFull,
    attempt_of,
    state_of,
)
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.status.overview import JobList, Overview
from loractl.scheduler.status.overview_text import job_list_text, overview_text
from loractl.scheduler.wait.queue import WaitingJobs
from loractl.scheduler.wait.reasons import Tier, Wait
from loractl.scheduler.wait.starts import ExpectedStart

from ...factories import NOON, job
from ...fleets import in_seconds

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


def overview(ran: list[Job], waiting: dict[Job, Wait], ended: list[Job], screen: Screen, **more: Any) -> str:
    answer = Overview(
        running=tuple(map(state_of, ran)),
        waiting=tuple(map(state_of, waiting)),
        waits=WaitingJobs(reasons={job.job_id: reason for job, reason in waiting.items()}),
        running_count=len(ran),
        waiting_count=len(waiting),
        sweeps=(),
        sweep_count=0,
        ended=Counter(row.status for row in ended),
        after=None,
        now=NOON,
    )
    return overview_text(replace(answer, **more), screen)


def listed(jobs: list[Job], now: dt.datetime, screen: Screen) -> str:
    answer = JobList(jobs=tuple(map(state_of, jobs)), waits=WaitingJobs(), chosen=False, after=None, now=now)
    return job_list_text(answer, screen)


def full(row: Job, screen: Screen = PLAIN, **more: Any) -> str:
    """`more`: attempts and events as rows, losses and held_out as points, wait."""
    return job_text(in_full(row, **more), screen)


def in_full(row: Job, **more: Any) -> JobInFull:
    of_none = {"wait": None, "attempts": (), "events": (), "losses": (), "held_out": (), "spec": {}, "data": {}}
    values = {**of_none, **more}
    values["attempts"] = tuple(map(attempt_of, values["attempts"]))
    return JobInFull(job=state_of(row), now=NOON, **values)


def history(
    row: Job, attempts: list[Attempt], events: list[Event], spec: dict[str, Any], screen: Screen = PLAIN
) -> str:
    return job_text(in_full(row, attempts=attempts, events=events, spec=spec), screen, full=True)


def test_of_two_starts_at_one_moment_the_first_by_the_rule_is_next() -> None:
    at = ExpectedStart(at=in_seconds(60), spread_s=0.0, nodes=("heron:0",))
    waits = WaitingJobs(starts={26: at, 25: at, 3: replace(at, at=in_seconds(90)), 9: replace(at, at=NOON)})
    answer = Overview(
        running=(), waiting=(), waits=waits, running_count=0, waiting_count=4, sweeps=(), sweep_count=0, ended={},
        after=None, now=NOON,
    )  # fmt: skip
    assert answer.next_start == (26, at)


def test_the_json_of_a_job_has_the_columns_names_and_plain_values() -> None:
    fields = state_of(running(ended_at=NOON, labels={"a": "b"})).as_json()
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
        listed([ended], NOON + dt.timedelta(days=2), screen),
    ]
    assert [line for text in texts for line in text.splitlines() if len(line) > width] == []


@pytest.mark.parametrize("width", [80, 110, 120])
def test_cards_give_way_before_the_screen_does(width: int) -> None:
    screen = Screen(width=width, unicode=True, color=False)
    several = tuple(f"a-long-host-name:{n}" for n in range(12, 16))
    jobs = (replace(state_of(largest_running()), cards=several), state_of(running()))
    text = overview([], {}, [], screen, running=jobs, running_count=2)
    assert [line for line in text.splitlines() if len(line) > width] == []
    assert re.search(r"evaluating|eval ", text)


def test_a_job_that_is_evaluated_shows_when_that_ends() -> None:
    evaluated = running(stage=Stage.EVALUATING, step=1584)
    (line,) = [line for line in overview([evaluated], {}, [], PLAIN).splitlines() if "box:0" in line]
    assert "evaluating" in line and "100%" not in line
    assert re.search(r" evaluating +\d\d:\d\d ", line), line


def test_how_far_an_evaluation_is_stands_where_its_steps_stood() -> None:
    evaluated = running(stage=Stage.EVALUATING, step=1584, evaluated=1300, to_evaluate=4000)
    (line,) = [line for line in overview([evaluated], {}, [], PLAIN).splitlines() if "box:0" in line]
    assert re.search(r" evaluating +32% +\d\d:\d\d ", line), line
    assert full(evaluated).splitlines()[2].endswith("  32%  1 300 of 4 000 rows and answers  10 min left")
    stored = running(stage=Stage.STORING, step=1584, evaluated=4000, to_evaluate=4000)
    assert full(stored).splitlines()[2].endswith(" 100%  1 584 of 1 584  10 min left")


def test_a_wide_screen_shows_the_model_and_the_method_as_well() -> None:
    assert "model-135M qlora" in overview([running()], {}, [], WIDE)
    assert "model-135M" not in overview([running()], {}, [], PLAIN)


@pytest.mark.parametrize("height", [24, 14, 9])
def test_a_small_window_has_what_runs_first_and_then_how_many_more_wait(height: int) -> None:
    screen = replace(PLAIN, height=height)
    ran = [running(job_id=number) for number in range(1, 4)]
    waiting = {job(job_id=number): wait("memory", f"box:0 when job {number} ends") for number in range(11, 41)}
    text = overview(ran, waiting, [], screen)
    lines = text.splitlines()
    assert lines[0] == "3 running, 30 waiting." and lines[-1].startswith("Today")
    shown = [int(line.split()[0]) for line in lines if re.match(r" *\d+  helpdesk", line)]
    there = [number for number in shown if number < 11]
    assert there == [1, 2, 3][: len(there)]
    more = re.search(r"^\+(\d+) more(: the same command with --after (\d+))?$", lines[-3])
    assert more and int(more[1]) + len(shown) - len(there) == 30
    assert (more[3] is None) == (shown == there) and (more[3] is None or int(more[3]) == shown[-1])
    assert height < 14 or (len(lines) <= height - 2 and len(there) == 3), "the prompts stand in the window, too"
    assert len(overview(ran, waiting, [], PLAIN).splitlines()) == 40, "a pipe has all of them"


def test_a_reason_that_several_jobs_share_is_told_once() -> None:
    same, other = wait("offline", "heron was last seen 3 min ago, and so on " * 3), wait("held", "by ada")
    text = overview([], {job(job_id=8): same, job(job_id=9): other, job(job_id=10): same}, [], PLAIN)
    assert text.count("seen") == 3 and re.search(r"10  helpdesk .* offline +as 8 ", text)


def test_what_is_wrong_with_a_box_stands_in_the_first_line_and_beside_its_job() -> None:
    text = overview([running()], {}, [], PLAIN, closed=("box silent for 20 s",), nodes={"box:0": "silent for 20 s"})
    assert text.startswith("1 running, 0 waiting, box silent for 20 s.")
    assert re.search(r"7  helpdesk .*2%  silent for 20 s  1\.23", text)
    assert full(running(), trouble="silent for 20 s").splitlines()[0].endswith("training; its card is silent for 20 s")


def test_a_result_is_told_whole_in_80_columns() -> None:
    message = "base_model x can't be loaded: the hub has no such name, or hides it from this worker"
    failed = job(status=Status.FAILED, reason=Reason.MODEL_NOT_FOUND, message=message, ended_at=NOON)
    text = listed([failed], NOON, PLAIN)
    assert message in " ".join(line.strip() for line in text.splitlines()) and "…" not in text


def test_what_is_redrawn_keeps_its_top_and_its_last_line_in_the_window() -> None:
    text = full(running(), events=[event(f"line {n}", n) for n in range(12)])
    shown = in_height(text, PLAIN, 10).splitlines()
    assert len(shown) == 10 and shown[0] == text.splitlines()[0] and shown[-1] == text.splitlines()[-1]
    assert shown[-2] == f"+{len(text.splitlines()) - 9} more lines"
    assert in_height(text, PLAIN, 100) == text


@pytest.mark.parametrize("screen", [PLAIN, ASCII, COLOR])
def test_escapes_are_written_only_where_there_is_colour_and_ascii_draws_no_blocks(screen: Screen) -> None:
    losses = ((1, 3.0), (2, 1.0))
    texts = [
        overview([running()], {job(): wait("busy", "x")}, [], screen),
        listed([running(), job(status=Status.FAILED, reason=Reason.DIVERGED, message="m")], NOON, screen),
        full(running(), screen, attempts=[attempt()], events=[event("started")], losses=losses),
        history(running(), [attempt()], [event("started")], {"name": "a"}, screen),
    ]
    for text in texts:
        assert ("\x1b" in text) == screen.color
        assert screen.unicode or not set(text) & set("█▏▎▍▌▋▊▉·▁▂▃▄▅▆▇✓✗")


def test_a_running_job_in_full_shows_its_place_course_and_next_command() -> None:
    text = full(
        running(),
        attempts=[attempt(ended_at=None)],
        events=[event("a"), event("b", 1)],
        losses=((1, 3.0), (30, 1.234)),
        held_out=((20, 1.5),),
    )
    lines = text.splitlines()
    assert lines[0] == "7 helpdesk on box:0, attempt 1, training"
    assert lines[2].endswith("   2%  30 of 1 584  10 min left")
    assert "loss      █▁  1.23 at step 30" in lines and "held out  ▁  1.50 at step 20" in lines
    assert "memory    6.0 GiB at most, planned 8.0 GiB   method qlora   speed 812 tok/s" in lines
    assert text.index("  b") < text.index("  a\n"), "the newest event first"
    assert lines[-1] == "Its log: loractl logs 7 -f   stop it: loractl cancel 7"
    assert max(map(len, lines)) <= 80
    stopping = full(running(cancel_requested=True), attempts=[attempt(ended_at=None)], events=[])
    assert "attempt 1, stopping" in stopping and " left" not in stopping, "it does not go on to its end"


def test_what_is_left_out_of_a_long_history_is_counted_with_the_option_that_shows_it() -> None:
    events = [event(f"line {minute}", minute) for minute in range(15)]
    shown = full(running(), events=events)
    assert "line 3" in shown and "line 2\n" not in shown and "3 older: loractl status 7 --full" in shown
    whole = history(running(), [], events, {})
    assert "line 0" in whole and "older" not in whole
    assert "older" not in full(running(), events=events[:12])


def test_the_peak_of_a_processor_is_called_one_of_ram() -> None:
    lines = full(running(), PLAIN, attempts=[attempt(device_kind="cpu")], events=[]).splitlines()
    assert "memory    6.0 GiB of RAM at most, planned 8.0 GiB   method qlora   speed 812 tok/s" in lines


def test_a_job_that_waits_failed_or_succeeded_says_why_and_what_to_do_next() -> None:
    waits = full(job(), wait=wait("worker", "no worker is online")).splitlines()
    assert waits[0] == "7 helpdesk waits: worker, no worker is online."
    failed = full(job(status=Status.FAILED, reason=Reason.DISK_FULL, message="no space")).splitlines()
    assert failed[0] == "7 helpdesk failed (disk_full): no space"
    assert failed[-1] == "Next: free space on the worker's disk, then loractl retry 7."
    late = full(job(status=Status.FAILED, reason=Reason.TIMED_OUT)).splitlines()
    assert late[-1].endswith("retry 7 --set resources.time_limit=2h starts again: there is no checkpoint.")
    late = full(job(status=Status.FAILED, reason=Reason.TIMED_OUT, checkpoint={"step": 4})).splitlines()
    assert late[-1] == "Next: loractl retry 7 --set resources.time_limit=2h continues from its checkpoint."
    done = full(
        job(status=Status.SUCCEEDED, reason=Reason.OK, message="done", adapter_uri="s3://a", report_uri="s3://r")
    ).splitlines()
    assert "adapter   s3://a" in done
    assert done[-1] == "Its report: loractl report 7   its adapter: loractl adapters pull 7 DIR"


def test_the_history_lists_every_attempt_with_how_it_ended_and_no_token() -> None:
    again = attempt(attempt=2, ended_at=None, reason=None, vram_peak=None, resumed_from_step=None)
    text = history(running(), [attempt(), again], [event("started")], {"name": "a"})
    assert re.search(r"1  box:0  qlora +8\.0 +6\.0 .*5 min  trainer_error  step 16", text)
    assert re.search(r"2  box:0  qlora +8\.0 +– .*runs$", text, re.M)
    assert "\nspec:\nname: a\n\nIts log" in text
    assert "secret-token" not in text


def test_a_terminal_breaks_the_history_between_words_and_a_pipe_has_it_whole() -> None:
    text = "attempt 1 started on heron:0 and heron:1 with qlora, " + "sharded over 2 cards, " * 3
    terminal = replace(PLAIN, height=50)
    for shown in (full(running(), terminal, events=[event(text)]), history(running(), [], [event(text)], {}, terminal)):
        assert max(map(len, shown.splitlines())) <= 80
        assert re.search(r"^ {7,}cards, sharded", shown, re.M), "below its text"
        assert text.strip() in " ".join(shown.split())
    assert text in history(running(), [], [event(text)], {})


def test_the_attempts_of_a_job_on_several_cards_fit_a_narrow_screen() -> None:
    shares = [AttemptShare(job_id=7, attempt=1, rank=n, node=f"kestrel:{n}", bytes=20 * GIB) for n in range(2)]
    one = attempt_of(attempt(node="kestrel:0", vram_reserved=20 * GIB), shares)
    answer = replace(in_full(running()), attempts=(one,))
    lines = job_text(answer, PLAIN, full=True).splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"1  kestrel 0, 1  qlora  20\.0   6\.0 ", "\n".join(lines))
    assert answer.as_json()["attempts"][0]["cards"][1] == {"node": "kestrel:1", "reserved": 20 * GIB, "used": None}


def test_the_adapters_are_listed_with_the_command_that_fetches_one() -> None:
    stored = StoredAdapter(
        job_id=7, attempt=1, name="helpdesk", base_model="org/model", method="lora", uri="s3://a", size=3_500_000,
        sha256="0", created_at=NOON, tags=("latest", "prod"),
    )  # fmt: skip
    text = adapters_text(AdapterList(adapters=(stored,), after=None, now=NOON), PLAIN)
    assert re.search(r"7  helpdesk  latest, prod  lora +3\.3 MiB .* model$", text, re.M)
    assert text.endswith("Use one: loractl adapters pull 7 DIR")
    assert adapters_text(AdapterList(adapters=(), after=None, now=NOON), PLAIN).startswith("No adapter is stored yet")


def test_control_characters_of_messages_events_and_names_never_reach_the_terminal() -> None:
    bad = f"{HOSTILE}\nsecond"
    failed = job(status=Status.FAILED, reason=Reason.TRAINER_ERROR, message=bad, user=HOSTILE)
    ran = running(user=HOSTILE, base_model=HOSTILE)
    texts = [
        full(failed, events=[event(bad)]),
        full(job(), wait=wait("held", bad)),
        listed([failed], NOON, PLAIN),
        overview([ran], {failed: wait("held", bad)}, [], WIDE),
        history(failed, [], [event(bad)], {"name": "a"}),
    ]
    for text in texts:
        assert all(c.isprintable() or c == "\n" for c in text)
    assert len(texts[2].splitlines()) == 2, "a message of two lines does not break the table"
