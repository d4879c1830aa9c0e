"""Two sweeps of eight on one base, whose members measure it each by themselves, and once for all of them:
python -m benchmarks.base_measured [KEY=VALUE,VALUE ...]

Eight members of examples/helpdesk-lora.yaml, cut to few steps, one after the other on the processor with the installed
`loractl` and a home for each sweep. Members with the label that `loractl reproduce` gives measure everything
themselves. Every number of the two members' reports must be the same, which is checked. Takes about ten minutes on two
cores; with other values to sweep, such as lora.r=4,16, there are fewer members.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
JOB = ROOT / "examples" / "helpdesk-lora.yaml"
HELD_OUT_ROWS, ANSWERS = 24, 8
CUT = ("training.max_steps=2", "training.save_steps=1000", "training.per_device_train_batch_size=2")
SWEPT = sys.argv[1:] or ["lora.r=4,16", "training.learning_rate=2e-5,2e-4,2e-3,2e-2"]
"""What the members differ by."""
OF_THE_BASE = ("base_measured_by_job", "base_measured_at", "base_rows_measured_again")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep took."""

    evaluations: list[dict[str, Any]]
    wall_s: float
    cpu_s: float


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="loractl-") as folder:
        held_out = Path(folder) / "held-out.jsonl"
        rows = (ROOT / "examples" / "data" / "helpdesk-test.jsonl").read_text().splitlines(keepends=True)
        held_out.write_text("".join(rows[:HELD_OUT_ROWS]))
        each = run(Path(folder) / "each", held_out, "labels.reproduces=benchmark")
        once = run(Path(folder) / "once", held_out)
    print("| | evaluation of each member, s | all eight, s | sweep, wall s | sweep, CPU s |")
    print("| --- | --- | --- | --- | --- |")
    for name, sweep in (("each measures the base", each), ("the first measures it", once)):
        seconds = [one["seconds"] for one in sweep.evaluations]
        told = ", ".join(f"{one:.1f}" for one in seconds)
        print(f"| {name} | {told} | {sum(seconds):.0f} | {sweep.wall_s:.0f} | {sweep.cpu_s:.0f} |")
    same = [numbers(one) == numbers(other) for one, other in zip(each.evaluations, once.evaluations, strict=True)]
    print(f"\nreports with equal numbers: {sum(same)} of {len(same)}")
    print(f"members whose base was measured by another: {sum(bool(one[OF_THE_BASE[0]]) for one in once.evaluations)}")


def numbers(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if key not in ("seconds", *OF_THE_BASE)}


def run(home: Path, held_out: Path, *more: str) -> Sweep:
    home.mkdir()
    asked = (f"evaluation.samples={ANSWERS}", f"dataset.eval_path={held_out}", *CUT, *more, *SWEPT)
    loractl(home, "sweep", JOB, *(part for setting in asked for part in ("--set", setting)))
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    loractl(home, "worker", "--drain-when-idle")
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    members = json.loads(loractl(home, "status", "--sweep", 1, "--json"))["members"]
    reports = [json.loads(loractl(home, "report", member["job_id"], "--json")) for member in members]
    loractl(home, "db", "stop")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sweep(evaluations=[report["evaluation"] for report in reports], wall_s=wall, cpu_s=cpu)


def loractl(home: Path, *args: object) -> str:
    environment = {**os.environ, "LORACTL_HOME": str(home), "LORACTL_DEVICES": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("loractl")), *map(str, args)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
