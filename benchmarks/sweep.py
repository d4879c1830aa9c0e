"""A sweep whose losers stop early beside the same run to its end: python -m benchmarks.sweep [KEY=VALUE,VALUE ...]

Eight members of examples/helpdesk-lora.yaml, cut to few steps, with the installed `loractl`, one worker on two
simulated cards (training runs on the processor) and a home for each sweep. Without dropout, so that an evaluation on
the way draws no random number: a member that runs to its end must come out the same in both sweeps, which is checked.
Takes about a quarter of an hour on two cores; with other values to sweep, such as lora.r=4,16, there are fewer members.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
JOB = ROOT / "examples" / "helpdesk-lora.yaml"
STEPS = 16
HELD_OUT_ROWS = 24
CARDS = "sim:8GiB,8GiB"  # two members at a time, each with half of the cores
SWEPT = sys.argv[1:] or ["lora.r=4,16", "training.learning_rate=2e-5,2e-4,2e-3,2e-2"]
"""What the members differ by."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="loractl-") as folder:
        held_out = Path(folder) / "held-out.jsonl"
        rows = (ROOT / "examples" / "data" / "helpdesk-test.jsonl").read_text().splitlines(keepends=True)
        held_out.write_text("".join(rows[:HELD_OUT_ROWS]))
        for home in ("full", "early"):
            (Path(folder) / home).mkdir()
        full, full_s = run(Path(folder) / "full", held_out)
        early, early_s = run(Path(folder) / "early", held_out, "--early-stop")
    show(full, early, full_s, early_s)


def run(home: Path, held_out: Path, *options: str) -> tuple[Any, float]:
    """The sweep as `status --sweep --json` tells it at its end, with its winner, and the worker's seconds."""
    cut = (f"training.max_steps={STEPS}", "training.save_steps=1000", "training.per_device_train_batch_size=4")
    less = ("lora.lora_dropout=0", "evaluation.samples=0", f"dataset.eval_path={held_out}")
    loractl(home, "sweep", JOB, *(part for setting in (*cut, *less, *SWEPT) for part in ("--set", setting)), *options)
    began = time.monotonic()
    loractl(home, "worker", "--drain-when-idle")
    seconds = time.monotonic() - began
    found = json.loads(loractl(home, "status", "--sweep", 1, "--json"))
    found["winner"] = json.loads(loractl(home, "compare", "--sweep", 1, "--json"))["winner"]
    loractl(home, "db", "stop")
    print(f"{home.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return found, seconds


def loractl(home: Path, *args: object) -> str:
    environment = {**os.environ, "LORACTL_HOME": str(home), "LORACTL_DEVICES": CARDS, "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("loractl")), *map(str, args)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def show(full: Any, early: Any, full_s: float, early_s: float) -> None:
    """The members side by side, and what stopping the losers saved."""
    print("| member | r | learning rate | final loss, all run | steps | loss at 25 % | at 50 % | final loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for whole, cut in zip(full["members"], early["members"], strict=True):
        settings = " | ".join(f"{value:g}" for value in cut["settings"].values())
        at = {point["rung"]: f"{point['loss']:.3f}" for point in cut["rungs"]}
        stopped = cut["reason"] == "pruned"
        end = "stopped" if stopped else f"{cut['final_loss']:.3f}"
        told = f"{at.get(0.25, '')} | {at.get(0.5, '')} | {end}"
        print(f"| {cut['job_id']} | {settings} | {whole['final_loss']:.3f} | {cut['step']} | {told} |")
        if not stopped and abs(whole["final_loss"] - cut["final_loss"]) > 1e-4:
            print(f"member {cut['job_id']} ends at {whole['final_loss']} without and {cut['final_loss']} with rungs")
    for name, found in (("all run", full), ("losers stop", early)):
        print(f"\n{name}: {found['winner']['sentence']}")
    print(f"\nsteps saved: {early['saved_steps']} of {early['total_steps']}")
    print(f"wall time: {full_s:.0f} s and {early_s:.0f} s, ratio {early_s / full_s:.2f}")


if __name__ == "__main__":
    main()
