"""Data that another process prepares: they are what they would be here, and those who train go on meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.attempt.trainer_process import MESSAGE_LIMIT
from loractl.worker.base.failure import TrainingFailed, explain
from loractl.worker.base.model import load_tokenizer
from loractl.worker.base.source import source_of
from loractl.worker.data.prompt import templated
from loractl.worker.data.token_rows import TokenRows
from loractl.worker.data.tokens import TokenRow
from loractl.worker.protocol.messages import Ended, LogLines, Note, Opened, Start, Stepped, Stop, Told, encode
from loractl.worker.recipe.members import Roster
from loractl.worker.recipe.order_desk import EXIT_ORPHANED
from loractl.worker.recipe.preparation import aside
from loractl.worker.recipe.preparation.aside import prepare_aside
from loractl.worker.recipe.preparation.handover import prepare_rows, read_handover, write_handover
from loractl.worker.recipe.run import Run

from .. import warm
from .conftest import Recipe
from .test_members import LONG, Process, weights

MARK = "0123456789abcdef"


@pytest.fixture
def forked(warm_start: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started here by `python -m` has the stack loaded."""
    folder = Path(warm_start[warm.SOCKET])
    monkeypatch.setenv(warm.SOCKET, str(folder))
    monkeypatch.setattr(sys, "executable", str(next(folder.glob("python-*"))))


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["plain", "packed", "regression", "classifier", "dropped", "final"])
def test_handed_over_data_are_the_data_that_were_prepared(
    start: Callable[..., Start], tmp_path: Path, kind: str
) -> None:
    moods = [{"text": f"row {n} is {mood}", "label": mood} for n in range(15) for mood in ("good", "bad")]
    texts = str(write_rows(tmp_path / "texts.jsonl", [{"text": "word " * n} for n in range(1, 31)]))
    other = str(write_rows(tmp_path / "other.jsonl", [{"text": f"something else {n}"} for n in range(4)]))
    keys: dict[str, dict[str, Any]] = {
        "plain": {},
        "packed": {"packing": True},
        "regression": {"evaluation": {"regression": other}},
        "classifier": {},
        "dropped": {
            "dataset": {"path": texts, "max_length": 64, "on_overflow": "drop", "test_size": 0.3},
            "evaluation": {"max_rows": 2},
        },
        "final": {"dataset": {"final_size": 0.3, "test_size": 0.2}},
    }
    order = start(**keys[kind])
    spec = order.spec
    if kind == "classifier":
        path = str(write_rows(tmp_path / "moods.jsonl", moods))
        said = {"name": "moods", "base_model": spec.base_model, "task_type": "SEQ_CLS", "dataset": {"path": path}}
        spec, order = JobSpec.model_validate(said), order.model_copy(update={"data_path": path})
    tokenizer = templated(load_tokenizer(spec.base_model), spec.dataset.template)
    data = prepare_rows(order, spec, tokenizer)
    (folder := tmp_path / "handover").mkdir()
    write_handover(data, spec, folder)
    read = read_handover(folder)
    for name in (
        "format",
        "why",
        "dropped",
        "overlap",
        "repeated",
        "sha256",
        "warnings",
        "label_names",
        "commits",
        "leaks",
    ):
        assert getattr(read, name) == getattr(data, name)
    assert (read.facts(), read.digest, read.answer_shares) == (data.facts(), data.digest, data.answer_shares)
    if kind == "classifier":
        assert "hold the answer in the question" in data.leaks[0], "the report says it beside its verdict"
    if kind == "final":
        assert read.final is not None and data.final is not None and read.of_final is not None
        assert list(read.final.tokens.rows) == list(data.final.tokens.rows) and len(read.final.tokens.rows) == 7
        assert list(read.final.examples) == list(data.final.examples)
        assert read.of_final.facts() == data.facts(), "labels and counts are known without the rows to train on"
    assert list(read.trained_rows) == list(data.trained_rows) and len(read.trained_rows) > 0
    for mine, theirs in ((read.train, data.train), (read.held_out, data.held_out), (read.regression, data.regression)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert list(mine.rows) == list(theirs.rows)
            assert (mine.truncated, mine.too_long) == (theirs.truncated, theirs.too_long)
    most = max(spec.evaluation.max_rows or len(data.held_out_examples), spec.evaluation.samples)
    assert read.held_out_examples == data.held_out_examples[:most]


def test_others_train_on_while_a_process_prepares_the_data_of_one_that_joins(
    recipe: Recipe, start: Callable[..., Start], tmp_path: Path, forked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of one become tokens elsewhere; of the others a row is bad, the process is killed, the job cancelled."""
    bad = {"path": str(write_rows(tmp_path / "bad.jsonl", [{"text": "fine"}, {"text": 5}])), "on_bad_row": "error"}
    joining = {**LONG, "seed": 7, "lora": {"r": 4}}
    recipe("alone", **joining)
    monkeypatch.setattr(aside, "LARGE_BYTES", 0)
    process, seen, pids, marks = Process(), list[tuple[int, str]](), dict[int, int](), list[str]()

    def begin() -> None:
        def none_here(*_: object) -> None:
            raise AssertionError("a row became tokens in the process that trains")

        monkeypatch.setattr("loractl.worker.data.row_forms.encode", none_here)
        others = {2: joining, 3: joining | {"dataset": bad}, 4: joining, 5: joining}
        orders = [start(f"job{n}", job_id=n, keep=True, joins=True, **keys) for n, keys in others.items()]
        process.send(*(order.model_copy(update={"mark": MARK}) for order in orders))

    def hear(message: Told) -> None:
        job = message.job_id
        if isinstance(message, LogLines) and (found := re.search(r"in process (\d+)", message.text)):
            pids[job] = int(found[1])
            seen.append((job, "begins"))
            deadline = time.monotonic() + 10
            while not (environment := Path(f"/proc/{found[1]}/environ").read_text()) and time.monotonic() < deadline:
                pass  # it is about to be there: the kernel ends the start of a program with it
            marks.append(environment)
            if job == 4:
                os.kill(pids[job], signal.SIGKILL)
            if job == 5:
                process.send(Stop(job_id=5, save=False))
        elif isinstance(message, Stepped) and job == 1:
            seen.append((1, "steps"))
        elif isinstance(message, Note) and message.kind == "data":
            seen.append((job, "has its data"))
        elif isinstance(message, Ended) and sum(len(process.of(n, Ended)) for n in (2, 3, 4, 5)) == 4:
            process.send(Stop(job_id=1, save=False))

    process.on.append(hear)
    process.when(1, Opened, begin)
    process.send(start("first", job_id=1, keep=True, **{**LONG, "max_steps": 10**6}))
    process.join()

    assert {job: process.ended(job).reason for job in (1, 2, 3, 4, 5)} == {
        1: Reason.CANCELLED, 2: Reason.OK, 3: Reason.BAD_DATA, 4: Reason.KILLED, 5: Reason.CANCELLED,
    }  # fmt: skip
    assert seen[seen.index((2, "begins")) : seen.index((2, "has its data"))].count((1, "steps")) > 1
    assert weights(tmp_path / "job2") == weights(tmp_path / "alone")
    assert process.ended(3).message == recipe_error(recipe, dataset=bad)
    assert "while it prepared its data" in process.ended(4).message
    assert not any("job 4" in fault for fault in process.remained()), "nothing happened to those who train"
    assert len(set(pids.values()) - {os.getpid()}) == 4 and not any(
        Path(f"/proc/{pid}").exists() for pid in pids.values()
    )
    assert all(f"LORACTL_RUN={MARK}\0" in mark and "LORACTL_JOB=" in mark for mark in marks)
    assert not list(tmp_path.glob("job*/data-*"))


def recipe_error(recipe: Recipe, **keys: object) -> str:
    """What a job's row says where it is alone."""
    from loractl.common.errors import DataError

    with pytest.raises(DataError) as raised:
        recipe("wrong", **keys)
    return raised.value.with_hint


def test_the_process_ends_with_the_one_that_started_it(
    start: Callable[..., Start], tmp_path: Path, forked: None
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", aside.PROCESS, str(tmp_path)], stdin=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdin is not None
    process.stdin.write(encode(start()))
    process.stdin.close()
    assert process.wait(timeout=60) == EXIT_ORPHANED


def test_a_process_that_has_much_to_say_is_heard_and_takes_the_trainers_commit(
    start: Callable[..., Start], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe would hold it up that nobody reads before its end, a message has a limit, and a branch may move."""
    repository = tmp_path / "hub" / "models--org--moved"
    shutil.copytree(tiny_model, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONVERBOSE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert source_of("org/moved", None)["revision"] == "a" * 40
    (repository / "refs" / "main").write_text("b" * 40)
    path, told = "/" + "long/" * 20_000, list[Told]()
    order = start(job={"base_model": "org/moved"}).model_copy(update={"data_path": path})
    run = Run(order=order, tell=told.append, roster=Roster(shared=True))
    late = threading.Timer(60, run.stop.set)
    late.start()
    with pytest.raises(TrainingFailed) as raised:
        prepare_aside(run)
    late.cancel()
    assert path.rstrip("/") in raised.value.sentence
    lines = [encode(message) for message in told if isinstance(message, LogLines)]
    assert sum(map(len, lines)) > MESSAGE_LIMIT > 2 * max(map(len, lines))


def test_a_full_disk_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "input_ids.npy").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        TokenRows.of([TokenRow(number=1, input_ids=[1, 2], labels=[1, 2])]).save(tmp_path)
    assert explain(raised.value, own_limit=False)[0] is Reason.DISK_FULL


def test_small_data_and_those_of_a_first_job_are_prepared_in_the_trainer(
    start: Callable[..., Start], tmp_path: Path
) -> None:
    assert not aside.is_large(start())
    big = write_rows(tmp_path / "big.jsonl", [{"text": "x" * 1000}] * 1001)
    assert aside.is_large(start(dataset={"path": str(big)}))
    assert aside.is_large(start(dataset={"path": "org/data"}))
