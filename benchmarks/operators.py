"""Where a step's time goes by operator, in the lean pass and in a tutorial's loop: python -m benchmarks.operators MODEL
FORMATS ROWS, like `./models/SmolLM2-135M-Instruct bf16,fp32 2,8`.

The tutorial is transformers' model with peft's adapter, rows padded, and torch's AdamW. Rows have 30 to 256 tokens
without meaning. One thread, one process; three steps of each are profiled after two that warm up. Told are CPU
milliseconds of a step.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

STEPS, WARM = 3, 2

KINDS = {
    "products": r"mm|linear|matmul|bmm",
    "attention": r"attention|ShortRows",
    "softmax and loss": r"softmax|nll|gather|scatter|cross_entropy|amax|logsumexp",
    "optimizer and clip": r"adam|foreach|norm",
    "copies and casts": r"copy_|clone|contiguous|cat$|_to_copy",
    "elementwise": r"mul|add|sub|div|neg|silu|rsqrt|pow|mean|sum|sigmoid|embedding|index|cos|sin",
}
"""By an operator's share of the profiled time; what fits none is "other": views, allocation, autograd's own work."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "formats", "rows"):
        parser.add_argument(name, metavar=name.upper())
    given = parser.parse_args()
    model, formats, counts = given.model, given.formats, given.rows
    import torch

    torch.set_num_threads(1)
    for dtype in formats.split(","):
        for count in map(int, counts.split(",")):
            sides = {"tutorial": tutorial(model, dtype, count), "lean": lean(model, dtype, count)}
            tables = {name: profiled(step) for name, step in sides.items()}
            print(f"{dtype}, {count} rows".ljust(24), *(name.rjust(10) for name in tables))
            for kind in (*KINDS, "other", "in all"):
                print(f"  {kind}".ljust(24), *(f"{table[kind]:10.1f}" for table in tables.values()))


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """CPU milliseconds of a step, by kind."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARM):
        step()
    began = time.process_time()
    for _ in range(STEPS):
        step()
    whole = 1e3 * (time.process_time() - began) / STEPS
    found: Counter[str] = Counter()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(STEPS):
            step()
    for row in trace.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, row.key)), "other")
        found[kind] += row.self_cpu_time_total
    seen = sum(found.values())  # by the clock, and so with what other programs took
    return dict.fromkeys(KINDS, 0.0) | {kind: whole * share / seen for kind, share in found.items()} | {"in all": whole}


def lean(model: str, dtype: str, count: int) -> Callable[[], None]:
    import torch

    from loractl.worker.data.tokens import TokenRow
    from loractl.worker.engine.loss import window_of
    from loractl.worker.engine.passes.lean import LeanPass

    adapted, precision = adapted_model(model, dtype, padded=False)
    forward = LeanPass(adapted, precision)
    rows = [TokenRow(number=n, input_ids=ids, labels=ids) for n, ids in enumerate(rows_of(count))]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        (batch,) = window_of(forward.loss, [rows])
        forward.learn(batch, torch.autograd.backward)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def tutorial(model: str, dtype: str, count: int) -> Callable[[], None]:
    import torch

    adapted, _ = adapted_model(model, dtype, padded=True)
    rows = rows_of(count)
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows]),
        "labels": torch.tensor([ids + [-100] * (longest - len(ids)) for ids in rows]),
    }
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        adapted(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapted_model(model: str, dtype: str, *, padded: bool) -> tuple[Any, Any]:
    from loractl.common.job.method import Method
    from loractl.common.job.spec import JobSpec
    from loractl.worker.base.arithmetic import choose_precision, compute_in
    from loractl.worker.base.kernels import load_kernels
    from loractl.worker.base.lora import add_adapter
    from loractl.worker.base.model import load_base

    load_kernels()
    asked = {"name": "o", "base_model": model, "method": "lora", "dataset": {"path": "x.jsonl"}, "lora": {"r": 8}}
    spec = JobSpec.model_validate({**asked, "training": {"exact": padded}})
    precision = choose_precision("cpu", "float32" if dtype == "fp32" else "bfloat16")
    adapted = add_adapter(load_base(model, Method.LORA, "cpu", precision), spec, Method.LORA).train()
    compute_in(adapted, precision)
    return adapted, precision


def rows_of(count: int) -> list[list[int]]:
    lengths = [256 - (n * 97) % 227 for n in range(count)]
    return [[3 + (n * 37 + at * 11) % 20000 for at in range(length)] for n, length in enumerate(lengths)]


if __name__ == "__main__":
    main()
