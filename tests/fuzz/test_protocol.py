"""No line ends supervisor or trainer in anything but an error that each foresees."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Stage
from loractl.worker.attempt.log import LogBook
from loractl.worker.attempt.trainer_process import TrainerProcess
from loractl.worker.protocol.messages import (
    Adjusted,
    Again,
    Ended,
    FileKept,
    GoingOn,
    Note,
    Order,
    Planned,
    Saved,
    StageChanged,
    Start,
    Stepped,
    Stop,
    Told,
    decode_order,
    decode_told,
    encode,
)

from ..unit.factories import spec
from .counting import INPUTS, fuzz

START = Start(
    job_id=1, attempt=1, user="ada", node="box:0", gpu="CPU", device="cpu", spec=spec(), method=Method.LORA,
    vram_planned=None, data_path="data.jsonl", data_sha256=None, eval_path=None, output_dir="out",
    checkpoint_dir="checkpoints", earlier_checkpoints=[], cache_dir="cache",
)  # fmt: skip
ORDERS: list[Order] = [START, Stop(job_id=1, save=True)]
TOLD: list[Told] = [
    StageChanged(job_id=1, stage=Stage.TRAINING),
    Stepped(job_id=1, step=1, total_steps=2, metrics={"loss": 1.0}),
    Adjusted(job_id=1, adjustment=START.adjustment),
    Planned(job_id=1, lora=1, qlora=None),
    Planned(job_id=1, base=1),
    Note(job_id=1, kind="data", text="rows"),
    Saved(job_id=1, step=3, path="/work/1/attempt-1/checkpoints/checkpoint-3"),
    Ended(job_id=1, reason=Reason.OK, message="done"),
    FileKept(job_id=1, key="a" * 64, sha256="0" * 64),
    GoingOn(job_id=1),
    Again(job_id=1, adjustment=START.adjustment, change="out of memory"),
]

values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(min_value=-(10**400), max_value=10**400), st.floats(),
        st.text(max_size=8), st.sampled_from(["start", "stop", "ended", "step", "ok", "1", "nan", "\ud800", "\0"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, messages: list[Any]) -> str:
    """A real message with fields taken away, replaced or added."""
    tree = json.loads(encode(draw(st.sampled_from(messages))))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.one_of(st.sampled_from(sorted(tree) or ["type"]), st.text(max_size=6)))
        if draw(st.booleans()):
            tree.pop(key, None)
        else:
            tree[key] = draw(values)
    return json.dumps(tree)


def lines_like(messages: list[Any]) -> st.SearchStrategy[str]:
    noise = st.one_of(
        st.text(max_size=60),
        values.map(json.dumps),
        st.builds(
            lambda opening, depth: opening * depth, st.sampled_from(["[", '{"a":', '"', "9"]), st.integers(1, 9000)
        ),
        st.binary(max_size=60).map(lambda raw: raw.decode("utf-8", "replace")),
        st.sampled_from(['{"type": "step", "job_id": 1, "step": 1e999, "total_steps": 1}', "NaN", "null", "{}", ""]),
    )
    return st.one_of(noise, changed(messages))


@fuzz
@given(line=lines_like(ORDERS))
def test_an_order_is_understood_or_refused_by_a_value_error(line: str) -> None:
    INPUTS["order"] += 1
    try:
        order = decode_order(line)
    except ValueError:
        return
    assert decode_order(encode(order)) == order


@fuzz
@given(line=lines_like(TOLD))
def test_what_is_told_is_understood_or_refused_by_a_value_error(line: str) -> None:
    INPUTS["told"] += 1
    try:
        message = decode_told(line)
    except ValueError:
        return
    again = decode_told(encode(message))
    assert type(again) is type(message)


@fuzz
@given(lines=st.lists(lines_like(TOLD), max_size=8))
def test_the_supervisor_reads_any_lines_to_their_end(lines: list[str]) -> None:
    """Each line of a trainer is a message of its job, or text for the log."""
    INPUTS["trainer's output"] += 1
    text = "".join(line.replace("\n", " ").replace("\r", " ") + "\n" for line in lines)
    ended: Any = SimpleNamespace(stdout=io.StringIO(text), stderr=io.StringIO(), pid=0, poll=lambda: 0)
    trainer = TrainerProcess(ended, 1, "run", io.StringIO(), LogBook())
    for reader in trainer._readers:
        reader.join()
    while not trainer.told.empty():
        assert trainer.told.get().job_id == 1
