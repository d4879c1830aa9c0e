"""The experiments that measure the engine: alone beside transformers' Trainer, in packs, and at 8B."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loractl.common.job.status import Status

from .lines import WorkerLines
from .rig import Figure, Rig, mib

METHODS = ("lora", "qlora")

NARROW, WIDE = "mistral 2B", "llama 8B"
"""The first one's layers have the shapes of the second's; it has a quarter of them, and a head of a quarter."""

NEAR = 0.02
"""Share by which held-out losses may differ: 16 bit, and a dozen steps."""

MEMBERS, LENGTHS = (2, 4, 8), (64, 256, 1024, 2048)


def solo(rig: Rig) -> Iterator[Figure]:
    """Time a step, peak of what is allocated, and held-out loss: lean, exact, and transformers' Trainer."""
    model, length = rig.workshop.model(WIDE if rig.long else NARROW), 256 if rig.small else 1024
    steps, batch = (4, 2) if rig.small else (10, 4)
    for method, mixed in (("lora", False), ("qlora", False), ("qlora", True))[: 2 if rig.small else 3]:
        rows, shape = rig.rows(length=length, mixed=mixed), map(str, (steps, batch, length))
        told = rig.told("solo", str(model), str(rows), method, rig.device, *shape)
        sides = {said["side"]: said for said in told}
        yield from solo_figures(sides, f"{method}, {batch} rows of {'180 to ' * mixed}{length}")


def solo_figures(sides: dict[str, dict[str, Any]], what: str) -> Iterator[Figure]:
    lean, exact, trainer = (sides[name] for name in ("lean", "exact", "trainer"))
    times = ", ".join(f"{1000 * side['seconds']:,.0f}" for side in (lean, exact, trainer))
    faster = f"{trainer['seconds'] / lean['seconds']:.2f} of the Trainer's speed"
    yield Figure(what=f"{what}: ms a step, lean, exact, Trainer", value=f"{times} ({faster})")
    peaks = ", ".join(mib(side["allocated"]) for side in (lean, exact, trainer))
    less = lean["allocated"] <= trainer["allocated"]
    yield Figure(what=f"{what}: allocated at the peak, lean, exact, Trainer", value=peaks, ok=less)
    losses = [side["loss"] for side in (lean, exact, trainer)]
    near = all(math.isclose(loss, losses[2], rel_tol=NEAR) for loss in losses)
    said = ", ".join(f"{loss:.4f}" for loss in losses)
    yield Figure(what=f"{what}: held-out loss, lean, exact, Trainer", value=said, ok=near)
    yield Figure(what=f"{what}: the lean pass", value=lean["pass"], ok=lean["pass"] == "SharedPass")


APART = 0.05
"""Share of the largest number by which two kernels may differ in 16 bit."""


def rows_at_once(rig: Rig) -> Iterator[Figure]:
    """Attention of 8B's shapes, forwards and backwards: one kernel for rows of any lengths against row by row."""
    for found in rig.told("attention", rig.device, *(["2x16"] if rig.small else ["4x1024", "16x256", "64x64"])):
        yield rows_figure(found, on_card=rig.device == "cuda")


def rows_figure(found: dict[str, Any], *, on_card: bool) -> Figure:
    what, by_row = f"{found['shape']}: ms a layer, one kernel, row by row", found["by row"]
    if "why" in found:
        return Figure(what=what, value=f"none, {by_row:.2f} ({found['why']})", ok=not on_card)
    faster, apart = by_row / found["at once"], found["apart"]
    said = f"{found['at once']:.2f}, {by_row:.2f} ({faster:.2f} of the speed, apart by {apart:.3f})"
    return Figure(what=what, value=said, ok=apart <= APART)


def packs(rig: Rig) -> Iterator[Figure]:
    """Members on one base against one by one: speed, memory beside the plan's sum, the rule, and what they learn."""
    model, rows = rig.workshop.model(WIDE if rig.long else NARROW), rig.rows(512, 128)  # every cut has learned tokens
    members, lengths = ((2,), (64,)) if rig.small else (MEMBERS, LENGTHS)
    shapes = [f"{count}x{length}" for length, count in itertools.product(lengths, members)]
    for kind in ("bf16", "nf4"):
        told = list(rig.told("packs", str(model), str(rows), kind, rig.device, rig.uuid, *shapes))
        for found, verdict in zip(told[:-1], told[-1]["rule"], strict=True):
            yield from pack_figures(kind, found, verdict, timed=not rig.small)


def pack_figures(kind: str, found: dict[str, Any], verdict: dict[str, Any], *, timed: bool = True) -> Iterator[Figure]:
    """`timed`: the times are a card's; those of a rehearsal say nothing."""
    count, what = found["members"], f"{kind}, {found['members']} of {found['tokens']} tokens"
    ratio = count * found["one"] / found["pack"]
    rate = count * found["tokens"] / found["pack"]
    admits = [name for name in ("sweep", "others") if verdict[name]]
    rule = f"the rule says {verdict['first']:.2f} at first, {verdict['fitted']:.2f} once it has measured these passes"
    takes = f"it takes {'jobs of a sweep' if 'sweep' in admits else 'none'}{' and of others' * ('others' in admits)}"
    yield Figure(
        what=f"{what}: against one by one",
        value=f"{ratio:.2f}, {rate:,.0f} tokens a second; {rule}; {takes}",
        ok=not timed or "sweep" not in admits or ratio >= WORTH,
    )
    process = found["process"]
    sizes = [mib(size) for size in (found["allocated"], found["reserved"], process, found["planned"])]
    within = process is None or process <= found["planned"]
    yield Figure(what=f"{what}: allocated, reserved, process, plan's sum", value=", ".join(sizes), ok=within)
    apart = f"held-out loss {found['loss']:.1e} relative, a weight {found['weight']:.1e}"
    apart += f", all weights {found['moved']:.1%} of their way"
    yield Figure(what=f"{what}: largest differences from alone", value=apart, ok=found["loss"] <= NEAR)


WORTH = 0.95
"""A pack that the rule takes may be so slow against one by one: a pass is measured to a few percent."""


def at_8b(rig: Rig) -> Iterator[Figure]:
    """From the claim to the first step, cold, with a spare trainer, and with the base there; memory lean and exact."""
    home, numbers = rig.at_home("wide"), itertools.count(1)
    try:
        for method in METHODS if rig.long else ("qlora",):
            lean, exact = (
                rig.job_file(f"wide-{method}-{e}", WIDE, method, max_steps=4, exact=e) for e in (False, True)
            )
            cold, kept = ("--no-spare", "--keep-warm=0"), ("--spare", "--keep-warm=10min")
            yield from _one_after_another(home, cold, {f"{method}, cold": lean}, numbers)
            there = f"{method}, with the base there"
            warm = {f"{method}, with a spare trainer": lean, there: lean, f"{method}, exact": exact}
            yield from _one_after_another(home, kept, warm, numbers)
    finally:
        home.leave()


def _one_after_another(
    rig: Rig, options: tuple[str, ...], jobs: dict[str, Path], numbers: Iterator[int]
) -> Iterator[Figure]:
    with WorkerLines(rig.cli.environment, *options, patience_s=rig.seconds) as worker:
        if "--spare" in options:
            worker.wait_for_spare()
        first = math.inf
        for name, job in jobs.items():
            rig.cli("submit", job, timeout=rig.seconds)
            seconds = worker.first_step()
            sooner = rig.small or seconds < first or not name.endswith("with the base there")
            first = min(first, seconds)
            yield Figure(what=f"{name}: claim to first step", value=f"{seconds:.1f} s", ok=sooner)
            yield _memory(rig, next(numbers), name)


def _memory(rig: Rig, job: int, what: str) -> Figure:
    """Plan beside what was measured. Once other jobs were in its process, the peaks are not a job's own."""
    last, row = rig.store.attempts(job)[-1], rig.store.job(job)
    sizes = [mib(size) for size in (last.vram_planned, last.vram_allocated, last.vram_peak, last.vram_process)]
    within = rig.device == "cpu" or (last.vram_process or 0) <= (last.vram_reserved or 0)
    well = row.status is Status.SUCCEEDED and row.attempt == 1
    value = f"{' / '.join(sizes)}; {row.status.value}, attempts {row.attempt}"
    return Figure(what=f"{what}: plan / allocated / reserved / process", value=value, ok=well and within)
