"""The experiments that measure the engine: next to transformers' Trainer, its steps part by part, and at 8B."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loractl.common.job.status import Status

from .lines import WorkerLines
from .rig import Figure, Rig, mib

METHODS = ("lora", "qlora")

ONE, NARROW, WIDE = "llama 1B", "mistral 2B", "llama 8B"
"""The second one's layers have the shapes of the third's; it has a quarter of them, and a head of a quarter."""

NEAR = 0.02
"""Share by which held-out losses may differ: 16 bit, and a dozen steps."""

DROPOUT = 0.05
"""A job's own, unless it says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training that several sides run. `mixed`: its rows are from an eighth of the length to the full length."""

    family: str
    method: str
    rows: int
    tokens: int
    dropout: float = DROPOUT
    recomputes: bool = True
    mixed: bool = False
    sides: tuple[str, ...] = ("lean", "trainer")

    @property
    def what(self) -> str:
        lengths = f"{self.tokens // 8} to " * self.mixed + str(self.tokens)
        how = "" if self.recomputes else ", no recomputation"
        return f"{self.family} {self.method}, {self.rows} x {lengths}, dropout {self.dropout:g}{how}"


FIRST = (
    Trial(family=ONE, method="lora", rows=8, tokens=256, sides=("lean", "trainer", "liger")),
    Trial(family=NARROW, method="qlora", rows=4, tokens=1024, sides=("lean", "trainer", "liger")),
    Trial(family=NARROW, method="qlora", rows=4, tokens=1024, recomputes=False),
)
"""What a lab asks first: how fast, with how much memory, with a job's own settings."""

THEN = (
    Trial(family=NARROW, method="qlora", rows=4, tokens=1024, dropout=0.0),
    Trial(family=NARROW, method="lora", rows=4, tokens=1024, sides=("lean", "exact", "trainer")),
    Trial(family=NARROW, method="qlora", rows=4, tokens=1024, mixed=True),
)


def beside_peft(rig: Rig) -> Iterator[Figure]:
    """Loss and gradients of the lean pass next to those of peft's own, on a few short rows: what a job compares before
    its base's first training on a kind of card."""
    formats = ["float32", "bfloat16", "nf4"]
    for found in rig.told("trial", str(rig.workshop.model(ONE)), rig.device, *formats):
        value = found["differs"] or f"alike, {found['ms']:.0f} ms"
        yield Figure(what=found["what"], value=value, ok=found["differs"] is None)


def solo(rig: Rig) -> Iterator[Figure]:
    """Tokens a second, share of what a product reaches, memory against the plan, and held-out loss, next to
    transformers' Trainer, and next to it with Liger's kernels if liger-kernel is installed."""
    yield from _tried(rig, [replace(one, family=WIDE) if rig.long and one.family == NARROW else one for one in FIRST])


def solo_more(rig: Rig) -> Iterator[Figure]:
    """The same without dropout, in exact mode, and with rows of mixed lengths."""
    yield from _tried(rig, THEN)


def _tried(rig: Rig, trials: Sequence[Trial]) -> Iterator[Figure]:
    for one in trials:
        trial = replace(one, rows=2, tokens=256) if rig.small else one
        model, rows = rig.workshop.model(trial.family), rig.rows(length=trial.tokens, mixed=trial.mixed)
        numbers = (4 if rig.small else 10, trial.rows, trial.tokens, trial.dropout, trial.recomputes)
        has_liger = rig.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
        sides = [side for side in trial.sides if side != "liger" or has_liger]
        told = rig.told("solo", str(model), str(rows), trial.method, rig.device, *map(str, numbers), *sides)
        yield from solo_figures({said["side"]: said for said in told}, trial.what, on_card=rig.device == "cuda")


def solo_figures(told: dict[str, dict[str, Any]], what: str, *, on_card: bool = True) -> Iterator[Figure]:
    card, sides = told["card"], {name: side for name, side in told.items() if name != "card"}
    lean, trainer, names = sides["lean"], sides["trainer"], ", ".join(sides)
    rates = ", ".join(f"{side['tokens'] / side['seconds']:,.0f}" for side in sides.values())
    faster = f"{trainer['seconds'] / lean['seconds']:.2f} of the Trainer's speed"
    share = card["needs"] / lean["seconds"] / card["reaches"]
    found = f"lean at {share:.0%} of a large product's {card['reaches'] / 1e12:,.0f} TFLOPS"
    yield Figure(what=f"{what}: tokens a second, {names}", value=f"{rates} ({faster}; {found})")
    peaks = ", ".join(mib(side["allocated"]) for side in sides.values())
    planned = card["planned"]
    within = lean["allocated"] <= trainer["allocated"] and (not on_card or lean["allocated"] <= PLANNED * planned)
    value = f"{peaks} ({mib(planned)} planned for lean)"
    yield Figure(what=f"{what}: allocated at the peak, {names}", value=value, ok=within)
    losses = [side["loss"] for side in sides.values()]
    near = all(math.isclose(loss, trainer["loss"], rel_tol=NEAR) for loss in losses)
    said = ", ".join(f"{loss:.4f}" for loss in losses)
    yield Figure(what=f"{what}: held-out loss, {names}", value=said, ok=near)
    if lean["pass"] != "LeanPass":
        yield Figure(what=f"{what}: the lean pass", value=lean["pass"], ok=False)


PLANNED = 1.05
"""How much a training may allocate, as a multiple of what its plan's tensors take: the plan's margin."""


def parts(rig: Rig) -> Iterator[Figure]:
    """A step's milliseconds by what the card does, and the gaps in which it waits, from torch's profiler."""
    shape = (2, 256) if rig.small else (4, 1024)
    for family, method in ((NARROW, "qlora"), (ONE, "lora")):
        model, rows = rig.workshop.model(family), rig.rows(length=shape[1])
        numbers = map(str, (*shape, DROPOUT))
        for found in rig.told("split", str(model), str(rows), method, rig.device, *numbers):
            how = "" if found["recomputes"] else ", no recomputation"
            yield split_figure(found, f"{family} {method}, {shape[0]} x {shape[1]}, dropout {DROPOUT:g}{how}")


def split_figure(found: dict[str, Any], what: str) -> Figure:
    """Without rights a profiler sees no kernel: NVreg_RestrictProfilingToAdminUsers of the driver, or the container."""
    whole = sum(found["parts"].values()) + found["gaps"]
    if not whole:
        return Figure(what=f"{what}: ms a step", value="the profiler saw no kernel: it lacks rights here", ok=False)
    told = {**found["parts"], "gaps between kernels": found["gaps"]}
    said = ", ".join(f"{part} {ms:,.1f} ({ms / whole:.0%})" for part, ms in told.items())
    return Figure(what=f"{what}: ms a step", value=f"{whole:,.0f}: {said}; {found['kernels']:,} kernels")


APART = 0.05
"""Share of the largest number by which two kernels may differ in 16 bit."""


def attention(rig: Rig) -> Iterator[Figure]:
    """Forwards and backwards, in 8B's shapes: memory if flash attention does not run, in fp32 and as on a T4; one
    kernel for rows of any length against row by row."""
    without_flash = ["64/float32", "64/float16"] if rig.small else ["4096/float32", "4096/float16"]
    shapes = ["2x16"] if rig.small else ["4x1024", "16x256", "64x64"]
    for found in rig.told("attention", rig.device, *without_flash, *shapes):
        yield (memory_figure if "taken" in found else rows_figure)(found, on_card=rig.device == "cuda")


def memory_figure(found: dict[str, Any], *, on_card: bool) -> Figure:
    what, taken = f"{found['shape']}, no flash attention: a layer takes, its scores would", found["taken"]
    return Figure(
        what=what, value=f"{mib(taken)}, {mib(found['scores'])}", ok=not on_card or 0 < taken < found["scores"]
    )


def rows_figure(found: dict[str, Any], *, on_card: bool) -> Figure:
    what, by_row = f"{found['shape']}: ms a layer, one kernel, row by row", found["by row"]
    if "why" in found:
        return Figure(what=what, value=f"none, {by_row:.2f} ({found['why']})", ok=not on_card)
    faster, apart = by_row / found["at once"], found["apart"]
    said = f"{found['at once']:.2f}, {by_row:.2f} ({faster:.2f} of the speed, apart by {apart:.3f})"
    return Figure(what=what, value=said, ok=apart <= APART)


def at_8b(rig: Rig) -> Iterator[Figure]:
    """From the claim to the first step, in a new process and in a fork; memory in lean and exact mode."""
    home, numbers = rig.at_home("wide"), itertools.count(1)
    try:
        for method in METHODS if rig.long else ("qlora",):
            lean, exact = (
                rig.job_file(f"wide-{method}-{e}", WIDE, method, max_steps=4, exact=e) for e in (False, True)
            )
            yield from _one_after_another(home, ("--no-fork-server",), {f"{method}, new process": lean}, numbers)
            forked = {f"{method}, fork": lean, f"{method}, exact": exact}
            yield from _one_after_another(home, ("--fork-server",), forked, numbers)
    finally:
        home.leave()


def _one_after_another(
    rig: Rig, options: tuple[str, ...], jobs: dict[str, Path], numbers: Iterator[int]
) -> Iterator[Figure]:
    with WorkerLines(rig.cli.environment, *options, patience_s=rig.seconds) as worker:
        if "--fork-server" in options:
            worker.wait_for_fork_server()
        for name, job in jobs.items():
            rig.cli("submit", job, timeout=rig.seconds)
            yield Figure(what=f"{name}: claim to first step", value=f"{worker.first_step():.1f} s")
            yield _memory(rig, next(numbers), name)


def _memory(rig: Rig, job: int, what: str) -> Figure:
    """The plan next to what was measured. If other jobs were in its process, the peaks are not the job's own."""
    last, row = rig.store.attempts.of_job(job)[-1], rig.store.jobs.get(job)
    sizes = [mib(size) for size in (last.vram_planned, last.vram_allocated, last.vram_peak, last.vram_process)]
    within = rig.device == "cpu" or (last.vram_process or 0) <= (last.vram_reserved or 0)
    well = row.status is Status.SUCCEEDED and row.attempt == 1
    value = f"{' / '.join(sizes)}; {row.status.value}, attempts {row.attempt}"
    return Figure(what=f"{what}: plan / allocated / reserved / process", value=value, ok=well and within)
