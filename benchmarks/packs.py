"""Trainings in a pack against the same ones after each other: python -m benchmarks.packs MODEL ROWS CASE [CASE ...]

CASE is a base (fp32, bf16 or nf4) and the tokens of each member's micro-batch: `bf16:64,64,64,64`; `4x128` stands for
four rows of 128. With `-apart` behind the base, each member's rows are multiplied by themselves, also where this
machine gives them the same bits together. In one process on one thread, a step of the pack and a step of each member
alone come in turn. Told are CPU seconds of both (the median of the steps after the first), their ratio, whether all
weights are the same bit for bit, the least ratio at which members of different people end sooner in the mean, and
what the pack rule thinks of it before it has measured anything. `memory:4` instead tells the largest resident set of
four members of 256 tokens in one process, beside that of one; `memory-recomputing:4` with gradient checkpointing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.gpu.lab import STEPS, Lab


def main() -> None:
    model, rows, *cases = sys.argv[1:]
    model, rows = str(Path(model).resolve()), str(Path(rows).resolve())
    for case in cases:
        kind, _, given = case.partition(":")
        if kind.startswith("memory"):
            _tell_memory(model, rows, kind, int(given))
        elif kind.startswith("peak"):
            print(_peak(model, rows, int(given), recompute="recomputing" in kind))
        else:
            print(_compare(model, rows, kind, given.split(",")), flush=True)


def _compare(model: str, rows: str, kind: str, shapes: list[str]) -> str:
    import torch

    from loractl.common.placement.pack_rule import PackedJob, PassLaw, join_verdict
    from loractl.worker.base.kernels import load_kernels

    torch.set_num_threads(1)
    load_kernels()
    lab = Lab(model, rows, kind.removesuffix("-apart"), apart=kind.endswith("-apart"))
    together, alone = lab.side(shapes, one_pack=True), lab.side(shapes, one_pack=False)
    for _ in range(STEPS):
        together.step()
        alone.step()
    same = all(
        torch.equal(a, b)
        for n in range(len(shapes))
        for a, b in zip(together.steps.loops[n].trained, alone.steps.loops[n].trained, strict=True)
    )
    pack, single = (statistics.median(side.costs[1:]) for side in (together, alone))
    count, tokens = len(shapes), [_tokens(shape) for shape in shapes]
    jobs = [PackedJob(tokens=number, sweep="s") for number in tokens]
    verdict = join_verdict(PassLaw.start(quantised=kind.startswith("nf4")), jobs[1:], jobs[0])
    return (
        f"{kind:10s} {count} jobs, {', '.join(shapes):40s} one by one {single:6.2f} s, pack {pack:6.2f} s, "
        f"{single / pack:5.2f}x, same bits: {'yes' if same else 'NO'}; others need {2 * count / (count + 1):.2f}x; "
        f"rule {verdict.speed_up:.2f}x, {'joins' if verdict.pays else 'refuses'} in a sweep"
    )


def _tokens(shape: str) -> int:
    count, _, length = shape.rpartition("x")
    return int(count or 1) * int(length)


def _tell_memory(model: str, rows: str, kind: str, count: int) -> None:
    peak = kind.replace("memory", "peak")
    several, one = (_child(model, rows, f"{peak}:{n}") for n in (count, 1))
    print(
        f"peak RSS: {count} members in one process {several:.0f} MiB, {count} processes of one {count * one:.0f} MiB "
        f"({several / count / one:.2f})"
    )


def _child(model: str, rows: str, case: str) -> float:
    command = [sys.executable, "-m", "benchmarks.packs", model, rows, case]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def _peak(model: str, rows: str, count: int, *, recompute: bool) -> float:
    import torch

    torch.set_num_threads(1)
    side = Lab(model, rows, "bf16", recompute=recompute).side(["256"] * count, one_pack=True)
    for _ in range(2):
        side.step()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
