"""The lean pass beside peft's own on a few short rows, as a job compares them before it trusts a kind of card.

    python -m tests.gpu.trial MODEL DEVICE FORMAT [FORMAT ...]

A FORMAT is float32, bfloat16 or nf4. Prints a line of JSON for each and each kind of rows: how they differ, or null,
and the milliseconds of a second comparison.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import choose_precision, compute_in
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base
from loractl.worker.engine.passes.choice import difference
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.recipe.kinds import trained_kind

KINDS: dict[str, dict[str, Any]] = {
    "answers": {}, "packed": {"training": {"packing": True}}, "pairs": {"task_type": "preference"},
}  # fmt: skip


def main() -> None:
    model, device, *formats = sys.argv[1:]
    for number_format in formats:
        for kind in KINDS:
            print(
                json.dumps({"what": f"{number_format}, {kind}", **compare(model, device, number_format, kind)}),
                flush=True,
            )


def compare(folder: str, device: str, number_format: str, kind: str) -> dict[str, Any]:
    """How the passes differ, and what a comparison takes."""
    method = Method.QLORA if number_format == "nf4" else Method.LORA
    dtype = "bfloat16" if method is Method.QLORA else number_format
    asked = {"name": "t", "base_model": folder, "method": method.value, "dataset": {"path": "x.jsonl"}, **KINDS[kind]}
    spec, precision = JobSpec.model_validate(asked), choose_precision("cuda" if device == "cuda" else "cpu", dtype)
    model = add_adapter(load_base(folder, method, device, precision), spec, method)
    compute_in(model, precision)
    loss = trained_kind(spec).loss(spec)
    lean, own = LeanPass(model, precision, loss=loss), PaddedPass(model, 0, loss=loss)
    found = difference(lean, own, precision, packing=spec.training.packing)
    began = time.perf_counter()
    difference(lean, own, precision, packing=spec.training.packing)
    return {"differs": found, "ms": 1e3 * (time.perf_counter() - began)}


if __name__ == "__main__":
    main()
