"""Eight short jobs on one base, cold, with a spare trainer, and with a host that stays: python -m benchmarks.hosts.

    python -m benchmarks.hosts [MODEL] [JOBS] [KEY=VALUE]...

The installed `loractl`, one worker on the processor for each way, the ways one after the other. The jobs are queued
before the worker's first claim. Wall is from that claim to the last job's end; a first step is counted from its claim.
Times are those at which the worker says so. Without a model's folder it is a tiny random Llama.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.models import make_tiny_model, write_job

from .spare import Lab

WAYS = {
    "cold": ("--no-spare", "--keep-warm=0"),
    "spare": ("--spare", "--keep-warm=0"),
    "warm": ("--no-spare", "--keep-warm=10min"),
    "spare, warm": ("--spare", "--keep-warm=10min"),
}


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] != "-" else None
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    settings = [f"--set={text}" for text in ("training.logging_steps=1", *sys.argv[3:])]
    with tempfile.TemporaryDirectory(prefix="lb-") as scratch:
        folder = Path(scratch)
        job = write_job(folder, (model or make_tiny_model(folder / "tiny")).absolute())
        print(f"{jobs} jobs          wall  first step: first  median of the others  longest of them")
        for way, options in WAYS.items():
            wall, steps = run(Lab(folder / way.replace(", ", "-"), *options), job, settings, jobs)
            others = steps[1:] or steps
            said = f"{steps[0]:>17.2f} s {statistics.median(others):>20.2f} s {max(others):>14.2f} s"
            print(f"{way:<12} {wall:>8.1f} s {said}", flush=True)


def run(lab: Lab, job: Path, settings: list[str], jobs: int) -> tuple[float, list[float]]:
    """Seconds from the first claim to the last end, and from each claim to its first step."""
    try:
        if lab.spare:
            assert lab.ready.acquire(timeout=300)
        for _ in range(jobs):
            lab.run("submit", job, *settings)
        steps = [lab.next_first_step() for _ in range(jobs)]
        return time.perf_counter() - lab.claimed_at, steps
    finally:
        lab.end()


if __name__ == "__main__":
    main()
