"""The lines of a job's log that people read while it trains."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any, cast

from loractl.worker.attempt.log import LogBook
from loractl.worker.attempt.trainer_process import TrainerProcess
from loractl.worker.protocol.log_lines import Pace, begin_text, evaluation_text, log_line, step_texts

FAR = Pace(step=1584, total_steps=3000, step_seconds=5.06, tokens_per_second=1434.4, left_seconds=7080)


def test_a_step_s_line_fits_into_80_columns_and_says_step_loss_rate_and_what_is_left() -> None:
    (text,) = step_texts({"loss": 1.23456, "grad_norm": 0.5}, FAR)
    assert text == "step 1584 of 3000  loss 1.2346  1434 tok/s  1 h 58 min left"
    line = log_line("training", text)
    assert re.fullmatch(r"\d\d:\d\d:\d\d training   step 1584 .*\n", line) and len(line.rstrip("\n")) <= 80


def test_a_line_leaves_out_what_is_not_known_yet() -> None:
    first = Pace(step=1, total_steps=3000, step_seconds=5.06, tokens_per_second=None, left_seconds=None)
    assert step_texts({"loss": 2.0}, first) == ["step    1 of 3000  loss 2.0000  5.06 s a step"]
    bare = Pace(step=1, total_steps=3000, step_seconds=None, tokens_per_second=None, left_seconds=None)
    assert step_texts({"eval_loss": 2.0}, bare) == ["step    1 of 3000  held-out loss 2.0000"]
    assert step_texts({"learning_rate": 1e-4}, FAR) == []
    assert evaluation_text(FAR) == "step 1584 of 3000  evaluates the held-out rows"


def test_the_first_line_says_whether_it_resumes_and_no_text_steers_a_terminal() -> None:
    assert begin_text(0, 8) == "trains: 8 steps, the first one takes longest"
    assert begin_text(4, 8) == "trains: 8 steps, continues after step 4"
    assert log_line("a", "of redis://:hunter2@db/0").endswith("of redis://:***@db/0\n")
    assert "\x1b" not in log_line("warning", "red\x1b[31m\ntext") and log_line("a", "b\nc").count("\n") == 1


def test_what_a_tracker_prints_comes_into_the_log_without_its_password() -> None:
    log, ended = io.StringIO(), SimpleNamespace(stdout=io.StringIO(), stderr=io.StringIO("to https://a:hunter2@b\n"))
    trainer = TrainerProcess(cast(Any, ended), 1, "run", log, LogBook())
    for reader in trainer._readers:
        reader.join()
    assert log.getvalue() == "to https://a:***@b\n"
