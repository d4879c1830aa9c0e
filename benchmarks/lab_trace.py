"""A made-up trace of a lab for benchmarks.placement: python -m benchmarks.lab_trace > lab.csv

600 trainings of six people on four base models in three weeks: ada submits half of them, in bursts like a sweep's; most
take between half an hour and five hours. The same in every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

JOBS = 600
BASES = {"qwen-1.5b": 3.0, "mistral-7b-nf4": 4.5, "llama-8b-nf4": 5.5, "llama-8b-bf16": 15.5}
"""GiB of each."""


def jobs() -> Iterator[tuple[float, float, float, str, str]]:
    """Arrival, GiB, seconds, user and base of each."""
    rng, clock, burst = random.Random(7), 0.0, 0
    user, base = "", ""
    for _ in range(JOBS):
        if burst == 0:
            user = rng.choice(["ada"] * 2 + ["bob", "cyd", "dan", "eve", "fay"])
            base, burst = rng.choice(list(BASES)), rng.choice((1, 2, 5)) if user == "ada" else 1
            clock += rng.expovariate(1 / 4500)
        burst -= 1
        clock += 20
        need, seconds = BASES[base] + rng.choice((2, 4, 7)), min(12 * 3600, rng.lognormvariate(8.3, 1.0))
        yield clock, need, seconds, user, base


def main() -> None:
    print("arrival,vram,duration,user,base_size")
    for clock, need, seconds, user, base in jobs():
        print(f"{clock:.0f},{need}GiB,{seconds:.0f},{user},{BASES[base]}GiB")


if __name__ == "__main__":
    main()
