"""The plan of a training on a processor, against what the recipe then takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import read_shape
from loractl.common.memory.plan import PROCESSOR_BYTES, plan
from loractl.common.memory.step import Lengths, Stack
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.gauge import _proc_status, release
from loractl.worker.engine.passes.wide import multiplies_wide

from ..models import make_tiny_model
from .conftest import Recipe

ROWS, TOKENS = 48, 128


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [None, True], ids=["as-it-comes", "checkpointing"])
def test_the_plan_for_a_processor_is_near_the_measured_peak(
    recipe: Recipe, tmp_path: Path, checkpointing: bool | None
) -> None:
    """Of the process's growth: what a test's process holds beside it is not what a trainer does."""
    base = make_tiny_model(tmp_path / "wide", layers=4, hidden=256)
    rows = [{"text": f"queue {n} priority storage network please answer the next line " * 20} for n in range(ROWS + 8)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = 2 if checkpointing else 1  # the second pass meets the optimizer's state, and the heap that the first left
    training = {"per_device_train_batch_size": ROWS, "max_steps": steps, "gradient_checkpointing": checkpointing}
    dtype = "float32" if choose_precision("cpu").amp is None else "auto"
    recipe("first", max_steps=1)  # imports what a training takes
    release()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set from here on
    before = _proc_status("VmRSS")
    ended, _ = recipe(
        dataset={"path": str(data), "max_length": TOKENS, "on_overflow": "truncate"},
        lora={"lora_dropout": 0.1},
        job={"base_model": str(base)},
        evaluation={"samples": 0, "max_rows": 1},
        dtype=dtype,
        **training,
    )
    assert ended.peaks.process is not None
    spec = JobSpec.model_validate(
        {
            "name": "wide", "base_model": str(base), "dataset": {"path": str(data), "max_length": TOKENS},
            "lora": {"r": 4, "lora_dropout": 0.1}, "training": {**training, "dtype": dtype},
            "evaluation": {"samples": 0},
        }
    )  # fmt: skip
    shape = read_shape(str(base), None)
    assert shape is not None
    stack = Stack(on_gpu=False, widens=multiplies_wide())
    planned = plan(shape, spec, Method.LORA, Lengths(train=TOKENS, evaluate=TOKENS, rows=ROWS), stack=stack)
    assert bool(planned.parts["allocator"]) == bool(checkpointing), "what the heap keeps where blocks are computed anew"
    grown = ended.peaks.process - before
    assert planned.peak_bytes == pytest.approx(PROCESSOR_BYTES + grown, rel=0.15)
    # where blocks are computed anew holes in the heap are planned at 0.7 of the activations, and processors with tiles
    # (AMX), which compute in bf16, meet 0.2 to 0.9
    most = 1.8 if checkpointing else 1.4
    assert 0.6 * grown <= planned.peak_bytes - PROCESSOR_BYTES <= most * grown
