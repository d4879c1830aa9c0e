"""A step on pairs beside TRL's DPOTrainer: python -m benchmarks.preferences MODEL PAIRS BASES BATCH PYTHON

PAIRS: a jsonl of plain text (prompt, chosen, rejected); BASES: some of bf16, fp32 and nf4, like bf16,fp32; BATCH: the
pairs of a step; PYTHON: that of an environment with TRL (pip install trl peft bitsandbytes). Each side is a process on
one thread, and they take their steps in turn, on the same pairs in the same order. Both score the base's answers in
each step, as a first epoch does. Told are real tokens of both answers a CPU second (the median step; the first one is
left out), the largest resident set, and their ratios to TRL's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .engine import LORA, STEPS, Side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "pairs", "bases", "batch", "python"):
        parser.add_argument(name, metavar=name.upper())
    given = parser.parse_args()
    model, bases, batch, trl = given.model, given.bases, given.batch, given.python
    lines = Path(given.pairs).read_text("utf-8").splitlines()[: STEPS * int(batch)]
    job = {
        "model": str(Path(model).resolve()), "batch": int(batch), "steps": STEPS, "learning_rate": 1e-4, "lora": LORA,
        "max_length": 256, "beta": 0.1, "pairs": [json.loads(line) for line in lines],
    }  # fmt: skip
    print(f"{batch + ' pairs':24s}tokens a CPU second   ratio   peak RSS, MiB   ratio")
    for base in bases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "job.json").write_text(json.dumps({**job, "base": base}), "utf-8")
            sides = {"trl_dpo": Side("trl_dpo", trl, folder), "loractl": Side("loractl", sys.executable, folder)}
            for _ in range(STEPS):
                for side in sides.values():
                    side.step()
            peaks = {name: side.end()["peak"] for name, side in sides.items()}
        for name, side in sides.items():
            speed = f"{side.speed:20.0f}{side.speed / sides['trl_dpo'].speed:7.2f}x"
            memory = f"{peaks[name]:16.0f}{peaks[name] / peaks['trl_dpo']:8.2f}"
            print(f"{name + ', ' + base:24s}{speed}{memory}", flush=True)


if __name__ == "__main__":
    main()
