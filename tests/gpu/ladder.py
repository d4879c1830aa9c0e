"""The steps down after out-of-memory, on a trainer that is held to less than its plan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.memory.plan import predict
from loractl.worker.protocol.messages import Adjusted, Ended, Note, Start, Told, decode_told, encode

from .families import HALF
from .rig import Figure, Rig, mib

SHARE = 0.6
"""Of the plan: 16 rows at once don't fit any more, nor do 8, and 4 do."""

ROWS = 16


def climb(rig: Rig) -> Iterator[Figure]:
    """Train under a limit of 0.6 of the plan, in a trainer's process of its own."""
    order = _order(rig, rig.folder / "ladder")
    told = _in_a_trainer(rig, order)
    ended = next((message for message in told if isinstance(message, Ended)), None)
    steps = [note.text for note in told if isinstance(note, Note) and note.kind == "memory"]
    adjusted = sum(isinstance(message, Adjusted) for message in told)
    yield Figure(
        what=f"limit of {SHARE} of the plan ({mib(order.memory_limit)})",
        value=f"{ended and ended.reason.value} after {adjusted} steps down: {'; '.join(steps) or 'none'}",
        ok=ended is not None and ended.reason is Reason.OK and (adjusted > 0 or rig.device == "cpu"),
    )


def spec_of(model: Path, data: Path, length: int, rows: int) -> JobSpec:
    """The job, with so many rows at once."""
    return JobSpec.model_validate(
        {
            "name": "ladder",
            "base_model": str(model),
            "method": "lora",
            "dataset": {"path": str(data), "max_length": length, "test_size": 0.125},
            "lora": {"r": 16, "lora_alpha": 32},
            "training": {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": rows},
            "evaluation": {"samples": 1, "max_new_tokens": 4},
        }
    )


def _order(rig: Rig, folder: Path) -> Start:
    model, length = rig.workshop.model(HALF), 256 if rig.small else 1024
    data = rig.rows(length=length)
    spec = spec_of(model, data, length, 2 if rig.small else ROWS)
    plan = predict(spec).lora
    assert plan is not None, "the family has a plan"
    (folder / "result").mkdir(parents=True)
    return Start(
        job_id=1,
        attempt=1,
        user="tester",
        node="card:0",
        gpu=rig.uuid,
        device="cuda" if rig.device == "cuda" else "cpu",
        spec=spec,
        method=Method.LORA,
        vram_planned=plan,
        memory_limit=int(SHARE * plan) if rig.device == "cuda" else None,  # a plan is for a card
        data_path=str(data),
        data_sha256=None,
        eval_path=None,
        output_dir=str(folder / "result"),
        checkpoint_dir=str(folder / "checkpoints"),
        earlier_checkpoints=[],
        cache_dir=str(folder / "cache"),
    )


def _in_a_trainer(rig: Rig, order: Start) -> list[Told]:
    environment = {**os.environ, **rig.of_a_trainer}
    process = subprocess.Popen(
        [sys.executable, "-m", "loractl.worker.recipe.trainer"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout
    process.stdin.write(encode(order))
    process.stdin.flush()
    told: list[Told] = []
    try:
        for line in process.stdout:
            told.append(decode_told(line))
            if isinstance(told[-1], Ended):
                break
    finally:
        process.stdin.close()
        process.wait(timeout=60)
    return told
