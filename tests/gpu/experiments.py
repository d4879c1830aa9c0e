"""The experiments of `make gpu`, each a function that yields lines of the table as it goes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loractl.common.job.status import Reason, Status
from loractl.common.settings import load_settings
from loractl.worker.device.devices import find_devices
from loractl.worker.node.health.self_test import SELF_TEST, self_test

from ..conftest import ROOT
from .families import FAMILIES, HALF
from .ladder import climb
from .rig import GIB, Figure, Rig, mib
from .speeds import METHODS, WIDE, at_8b, attention, beside_peft, parts, solo, solo_more


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """`seconds`: a guess of what it takes on one large card. It starts only if this much time is left."""

    run: Callable[[Rig], Iterator[Figure]]
    seconds: int
    always: bool = True  # False: only if time is left

    @property
    def asks(self) -> str:
        """What it checks, in a sentence or two."""
        return " ".join((self.run.__doc__ or "").split())


def the_self_test(rig: Rig) -> Iterator[Figure]:
    """What a node checks on a card before it serves."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": rig.uuid if rig.device == "cuda" else ""}
    report = self_test([sys.executable, "-m", SELF_TEST, rig.device, rig.uuid], environment)
    sees_us = rig.device == "cpu" or bool(report.sees_us)
    yield Figure(what="self-test", value=report.fault or f"passed in {report.seconds} s", ok=report.fault is None)
    yield Figure(what="driver, torch, CUDA", value=f"{report.driver}, {report.torch}, {report.cuda}")
    yield Figure(what="a context, at first and at the end", value=f"{mib(report.context)}, {mib(report.context_after)}")
    yield Figure(what="cuBLAS workspaces after one product", value=mib(report.workspaces))
    yield Figure(what="NVML sees our own process", value=f"{report.sees_us}, {mib(report.process)}", ok=sees_us)


def two_methods_at_once(rig: Rig) -> Iterator[Figure]:
    """LoRA and QLoRA at the same time through a real worker, one attempt each; NVML against our own gauge."""
    jobs = [rig.submit(f"both-{method}", HALF, method) for method in ("lora", "qlora")]
    with watched(rig) as peaks:
        rig.work(LORACTL_MAX_JOBS_PER_GPU="2" if rig.device == "cuda" else "1")
    yield from (rig.outcome(job) for job in jobs)
    attempts = [rig.store.attempts.of_job(job)[0] for job in jobs]
    first_end = min(a.ended_at for a in attempts if a.ended_at is not None)
    together = max(a.started_at for a in attempts) < first_end
    yield Figure(what="both ran at once", value=str(together), ok=together or rig.device == "cpu")
    told = sorted(attempt.vram_process or 0 for attempt in attempts)
    seen = sorted(peaks.values())[-2:]
    for ours, theirs in zip(told, seen, strict=False):
        near = abs(ours - theirs) <= max(0.05 * theirs, 64 * 2**20)
        yield Figure(what="a trainer's peak: our gauge, NVML", value=f"{mib(ours)}, {mib(theirs)}", ok=near)


def plans(rig: Rig) -> Iterator[Figure]:
    """Planned, allocated, reserved and process memory of model families, by two methods."""
    families = [family for family in FAMILIES if family != WIDE or rig.long]
    families = families[-1:] if rig.small else families if rig.long else ["gemma2 2B", HALF]
    jobs = {(family, m): rig.submit(f"plan-{n}-{m}", family, m) for n, family in enumerate(families) for m in METHODS}
    rig.work()
    for (family, method), job in jobs.items():
        last, row = rig.store.attempts.of_job(job)[-1], rig.store.jobs.get(job)
        sizes = [mib(size) for size in (last.vram_planned, last.vram_allocated, last.vram_peak, last.vram_process)]
        within = rig.device == "cpu" or (last.vram_process or 0) <= (last.vram_reserved or 0)
        yield Figure(
            what=f"{family}, {method}: plan / allocated / reserved / process",
            value=f"{' / '.join(sizes)}; {row.status.value}, attempts {row.attempt}",
            ok=row.status is Status.SUCCEEDED and row.attempt == 1 and within,
        )


def half_precision(rig: Rig) -> Iterator[Figure]:
    """A run in float16, as on cards before Ampere."""
    dtype = "float16" if rig.device == "cuda" else "float32"  # a processor has no loss scaling
    job = rig.submit("float16", HALF, "lora", dtype=dtype)
    rig.work()
    yield rig.outcome(job)
    yield Figure(what="float16: the last loss", value=str(rig.store.jobs.get(job).loss))


def out_of_memory(rig: Rig) -> Iterator[Figure]:
    """The ladder: with a limit of 0.6 of the plan, and next to a program that takes memory away."""
    yield from climb(rig)
    batch, steps = (2, 8) if rig.small else (16, 30)
    job = rig.submit("robbed", HALF, "lora", per_device_train_batch_size=batch, max_steps=steps)
    everything = rig.total if rig.device == "cuda" else 2**26
    with rig.worker("--high-water", "5s"):
        rig.until(lambda: rig.store.jobs.get(job).status is not Status.QUEUED, "a start")
        with rig.thief(everything) as thief:
            assert thief.stdout and thief.stdout.readline().startswith("took "), "the thief got nothing"
            began = time.monotonic()
            rig.until(lambda: _met_the_thief(rig, job) or time.monotonic() - began > 30, "the thief's effect")
        rig.until_over(job)
    row = rig.store.jobs.get(job)
    reasons = [str(attempt.reason and attempt.reason.value) for attempt in rig.store.attempts.of_job(job)]
    yield Figure(
        what="beside a thief of all free memory",
        value=f"{row.status.value} after {', '.join(reasons)}; adjusted: {row.adjustment}",
        ok=row.status is Status.SUCCEEDED,
    )


def _met_the_thief(rig: Rig, job: int) -> bool:
    """Whether the job has ended, was adjusted, or an attempt of it has ended."""
    row = rig.store.jobs.get(job)
    ended = any(attempt.ended_at is not None for attempt in rig.store.attempts.of_job(job))
    return row.status.is_terminal or row.adjustment is not None or ended


def killed(rig: Rig) -> Iterator[Figure]:
    """kill -9 of a QLoRA trainer with paged 8-bit state, which resumes from its checkpoint."""
    job = rig.submit("killed", HALF, "qlora", max_steps=400 if rig.small else 60, save_steps=4)
    with rig.worker():
        rig.until_job(job, lambda row: (row.step or 0) >= 9, "step 9")
        os.kill(rig.trainer_of(job).pid, signal.SIGKILL)
        rig.until_job(
            job, lambda row: row.attempt == 2 and rig.store.attempts.of_job(job)[1].resumed_from_step, "a resume"
        )
        if rig.small:
            rig.store.jobs.cancel(job, "tester")
        rig.until_over(job)
    second = rig.store.attempts.of_job(job)[1]
    well = rig.small or rig.store.jobs.get(job).status is Status.SUCCEEDED
    yield Figure(what="kill -9, then resumed", value=f"from step {second.resumed_from_step}: {second.reason}", ok=well)


def shared(rig: Rig) -> Iterator[Figure]:
    """Two jobs, `serve` and another program on one card."""
    served = next(a.job_id for a in rig.store.adapters.all() if "both" in a.name)
    with serving(rig, served) as ask, rig.thief(min(2 * GIB, rig.total // 8)) as stranger:
        jobs = [rig.submit(f"shared-{n}", HALF, "lora") for n in range(1 if rig.small else 2)]
        with rig.worker():
            answers = 0
            while not all(rig.store.jobs.get(job).status.is_terminal for job in jobs):
                ask()
                answers += 1
                time.sleep(0.5)
                if rig.left <= 0:
                    raise TimeoutError("the jobs beside serve did not end")
            (row,) = rig.store.cards.nodes()
            seen = [program for program in row.outside if program["pid"] == stranger.pid]
    yield from (rig.outcome(job) for job in jobs)
    yield Figure(what="answers of serve meanwhile", value=str(answers), ok=answers > 0)
    value = ", ".join(mib(program["bytes"]) for program in seen) or "none"
    yield Figure(what="of the outsider the node sees", value=value, ok=rig.device == "cpu" or bool(seen))


@contextmanager
def serving(rig: Rig, job: int) -> Iterator[Callable[[], str]]:
    """A server of one adapter, and a function that asks it."""
    process = rig.cli.start("serve", "--adapters", str(job), "--cache-memory", "1GiB", "--port", "0")
    lines: list[str] = []
    assert process.stdout
    out = process.stdout
    reader = threading.Thread(target=lambda: lines.extend(iter(out.readline, "")), daemon=True)
    reader.start()
    try:
        rig.until(lambda: any("Serving at" in line for line in lines) or process.poll() is not None, "serve")
        said = "".join(lines)
        if "Serving at " not in said:
            raise RuntimeError(f"serve ended: {said[-300:]}")
        address = said.split("Serving at ")[1].split(";")[0]
        with urllib.request.urlopen(f"{address}/models") as answer:
            model = next(m["id"] for m in json.loads(answer.read())["data"] if m["id"] != "base")

        def ask() -> str:
            question = {"model": model, "messages": [{"role": "user", "content": "gpu?"}], "max_tokens": 4}
            request = urllib.request.Request(
                f"{address}/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(json.loads(answer.read())["choices"][0]["message"]["content"])

        yield ask
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def faults(rig: Rig) -> Iterator[Figure]:
    """A device-side assert, which is the program's fault, and an illegal address, which may be the card's fault."""
    trainer = {"LORACTL_TRAINER": "tests.gpu.faulty_trainer", "PYTHONPATH": str(ROOT)}
    for how, reason in (("assert", Reason.TRAINER_ERROR), ("address", Reason.GPU_ERROR)):
        job = rig.submit(f"fault-{how}", HALF, "lora")
        with rig.worker(GPU_FAULT=how, **trainer):
            rig.until(lambda job=job: any(a.ended_at for a in rig.store.attempts.of_job(job)), how)
            rig.store.jobs.cancel(job, "tester")
        first = rig.store.attempts.of_job(job)[0]
        yield Figure(what=f"a kernel's {how}", value=f"{first.reason}: {first.message}", ok=first.reason is reason)
        for target in rig.store.cards.drains():
            rig.store.cards.end_drain(target)  # it failed on purpose


@contextmanager
def watched(rig: Rig) -> Iterator[dict[int, int]]:
    """The peak that NVML shows for each process meanwhile, by its PID."""
    device, peaks, over = find_devices(load_settings(rig.cli.environment))[0], dict[int, int](), threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in device.look().processes or ():
                peaks[process.pid] = max(peaks.get(process.pid, 0), process.bytes or 0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


EXPERIMENTS: dict[str, Experiment] = {
    "The lean pass beside peft's own": Experiment(run=beside_peft, seconds=20),
    "Self-test": Experiment(run=the_self_test, seconds=15),
    "Alone, next to the Trainer": Experiment(run=solo, seconds=80),
    "Where a step goes": Experiment(run=parts, seconds=25),
    "Attention": Experiment(run=attention, seconds=15),
    "LoRA and QLoRA at once": Experiment(run=two_methods_at_once, seconds=45),
    "8B: start and memory": Experiment(run=at_8b, seconds=100),
    "kill -9": Experiment(run=killed, seconds=40),
    "Alone, in other ways": Experiment(run=solo_more, seconds=60, always=False),
    "Kernels that fail": Experiment(run=faults, seconds=40, always=False),
    "Out of memory": Experiment(run=out_of_memory, seconds=60, always=False),
    "Plans": Experiment(run=plans, seconds=80, always=False),
    "Two jobs, serve and an outsider": Experiment(run=shared, seconds=60, always=False),
    "float16": Experiment(run=half_precision, seconds=25, always=False),
}
"""In this order: after three minutes, the first six have shown whether it works, how fast, with how much memory."""
