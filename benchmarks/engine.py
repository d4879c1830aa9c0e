"""A step by the engine beside other tools': python -m benchmarks.engine MODEL ROWS BASES BATCH [SIDE=PYTHON ...]

BASES are some of bf16, fp32 and nf4, like bf16,fp32; each side takes steps in each. BATCH: the rows of a step. The
sides are `loractl` and `tutorial` (transformers' Trainer on peft's model), and those that are named with the Python of
an environment of their own: `trl_sft=/tmp/trl/bin/python`, `llamafactory_sft=/tmp/llamafactory/bin/python`. Each is a
process on one thread; all learn the same rows in the same order and take their steps in turn. Told are real tokens a
CPU second (the median step; the first one is left out, since it compiles kernels), their ratio to the tutorial's in the
base that is its fastest here, the loss on held-out rows after the last step, and the largest resident set. `limit` is
what the base's matrix products alone take: forward, and the gradients of their inputs. A base takes two to four minutes
of CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 6
HELD_OUT = 16
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
OURS = {"tutorial": "tutorial.py", "loractl": "loractl_job.py"}
SIDES = Path(__file__).parent / "sides"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "rows", "bases", "batch"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("rivals", nargs="*", metavar="SIDE=PYTHON")
    given = parser.parse_args()
    bases, batch = given.bases, given.batch
    pythons = dict.fromkeys(OURS, sys.executable) | dict(rival.split("=", 1) for rival in given.rivals)
    job = job_of(str(Path(given.model).resolve()), str(Path(given.rows).resolve()), int(batch))
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[tuple[str, str], Side] = {}
        for base in bases.split(","):
            of_base = Path(folder) / base
            of_base.mkdir()
            (of_base / "job.json").write_text(json.dumps({**job, "base": base}), "utf-8")
            sides |= {(name, base): Side(name, python, str(of_base)) for name, python in pythons.items()}
        for _ in range(STEPS):
            for side in sides.values():
                side.step()
        ends = {name: side.end() for name, side in sides.items()}
    most = limit(job)
    slow, heavy = max((side.speed, ends[of]["peak"]) for of, side in sides.items() if of[0] == "tutorial")
    what = "tokens a CPU second   ratio   held-out loss   peak RSS, MiB   ratio   of the limit"
    print(f"{batch + ' rows':22s}{what}")
    for (name, base), side in sides.items():
        loss, peak = ends[name, base]["loss"], ends[name, base]["peak"]
        print(
            f"{name + ', ' + base:22s}{side.speed:20.0f}{side.speed / slow:7.2f}x{loss:16.4f}{peak:16.0f}"
            f"{peak / heavy:8.2f}{side.speed / most:15.2f}",
            flush=True,
        )


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, name: str, python: str, folder: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python, str(SIDES / OURS.get(name, f"{name}.py")), folder]
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._costs: list[dict[str, float]] = []

    @property
    def speed(self) -> float:
        """Tokens a CPU second of the median step."""
        return statistics.median(cost["tokens"] / cost["seconds"] for cost in self._costs[1:])

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self._costs.append(self._told())

    def end(self) -> dict[str, float]:
        told = self._told()
        self._process.wait()
        return told

    def _told(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._process.args!r} ended with {self._process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found


def job_of(model: str, rows: str, batch: int, max_length: int = 256) -> dict[str, Any]:
    """Rows as tokens, and the settings of all sides."""
    from loractl.common.job.spec import JobSpec
    from loractl.worker.base.model import load_tokenizer
    from loractl.worker.data.prepared import prepare_data

    asked = {"name": "b", "base_model": model, "dataset": {"path": rows, "max_length": max_length}}
    tokenizer = load_tokenizer(model)
    data = prepare_data(JobSpec.model_validate(asked).dataset, rows, None, None, tokenizer, None)

    def plain(some: Any) -> list[dict[str, list[int]]]:
        return [{"input_ids": [*row.input_ids], "labels": [*row.labels]} for row in some]

    return {
        "model": model, "batch": batch, "steps": STEPS, "learning_rate": 1e-3, "lora": LORA,
        "train": plain(data.train.rows[: STEPS * batch]), "held_out": plain(data.held_out.rows[:HELD_OUT]),
        "pad": tokenizer.pad_token_id,
    }  # fmt: skip


def limit(job: dict[str, Any]) -> float:
    """Tokens a CPU second of the base's matrix products alone, in bf16 or fp32, whichever is faster here, with the head
    on learned tokens."""
    import torch

    from loractl.common.job.method import Method
    from loractl.worker.base.arithmetic import choose_precision
    from loractl.worker.base.model import load_base

    torch.set_num_threads(1)
    base = load_base(job["model"], Method.LORA, "cpu", choose_precision("cpu", "bfloat16"))
    tokens = 512
    learned = sum(label >= 0 for row in job["train"] for label in row["labels"][1:])
    share = learned / sum(len(row["input_ids"]) for row in job["train"])

    def seconds(weight: torch.Tensor, count: int) -> float:
        x = torch.randn(count, weight.shape[1], dtype=weight.dtype)
        g = torch.randn(count, weight.shape[0], dtype=weight.dtype)
        began = time.process_time()
        torch.nn.functional.linear(x, weight)
        torch.matmul(g, weight)
        return time.process_time() - began

    def once() -> float:
        inner = (m.weight for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n)
        return sum(seconds(w, tokens) for w in inner) + seconds(base.lm_head.weight, int(tokens * share))

    def median(dtype: torch.dtype) -> float:
        base.to(dtype)
        once()  # compiles kernels
        return statistics.median(once() for _ in range(5))

    return tokens / min(median(dtype) for dtype in (torch.bfloat16, torch.float32))


if __name__ == "__main__":
    main()
