"""What the experiments on a card share: a home of its own, models, jobs, a worker, and what is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from loractl.common.job.status import Status
from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import TRAINER, load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.worker.device.occupancy import JOB_VARIABLE

from ..conftest import ROOT, Cli
from .families import Workshop

MIB, GIB = 2**20, 2**30

PHRASE, OVERHEAD = "something is broken ", 64
"""The text that fills rows, and the tokens of everything else in a row."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    what: str
    value: str
    ok: bool = True


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A lab of one card, or of the processor for the rehearsal."""

    cli: Cli
    store: Store
    workshop: Workshop
    folder: Path
    uuid: str = "cpu"
    total: int = 0  # bytes of the card
    deadline: float = float("inf")  # by the monotonic clock
    long: bool = False  # larger models, and all families

    @property
    def device(self) -> str:
        return self.workshop.device

    @property
    def small(self) -> bool:
        return self.workshop.small

    @property
    def left(self) -> float:
        """Seconds until the time is over. The time to make models does not count: a slow disk proves nothing."""
        return self.deadline + sum(self.workshop.seconds) - time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds left for what runs now."""
        return max(1.0, min(300.0, self.left))

    def rows(self, count: int = 64, length: int = 1024, *, mixed: bool = False) -> Path:
        """Conversations of up to `length` tokens, a third of them the question's; with `mixed` some are an eighth as
        long. The tests' tokenizer makes a token of nearly each letter."""
        path = self.folder / f"rows-{count}-{length}{'-mixed' * mixed}.jsonl"
        with path.open("w") as stream:
            for n in range(count):
                most = (length - OVERHEAD) // len(PHRASE)
                times = max(3, most * (8 - n * 5 % 8) // 8 if mixed else most - n % 4)
                question = f"ticket {n}: " + PHRASE * (times // 3)
                answer = "queue: " + ("storage ", "network ", "gpu ")[n % 3] + PHRASE * (times - times // 3)
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                stream.write(json.dumps({"messages": messages}) + "\n")
        return path

    def job_file(self, name: str, family: str, method: str, *, length: int = 1024, **training: Any) -> Path:
        """A job file, with rows of its own."""
        length = 256 if self.small else length
        steps = {"max_steps": 4 if self.small else 12, "per_device_train_batch_size": 2 if self.small else 4}
        job = {
            "name": name,
            "base_model": str(self.workshop.model(family)),
            "method": method,
            "dataset": {"path": str(self.rows(length=length)), "max_length": length, "test_size": 0.125},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "training": {"logging_steps": 1, "save_steps": 4, "gradient_accumulation_steps": 1, **steps, **training},
            "evaluation": {"samples": 1, "max_new_tokens": 4},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(job))  # JSON is YAML
        return path

    def submit(self, name: str, family: str, method: str, *, length: int = 1024, **training: Any) -> int:
        """Queue a job; returns its number."""
        path = self.job_file(name, family, method, length=length, **training)
        said = json.loads(self.cli("submit", path, "--json", timeout=self.seconds).stdout)
        return int((said[0] if isinstance(said, list) else said)["job_id"])

    def at_home(self, name: str) -> Rig:
        """The same box with a home of its own, where no trainer of another home is available."""
        cli = self.cli.with_environment(LORACTL_HOME=str(self.folder / name))
        cli("db", "upgrade")
        return replace(self, cli=cli, store=Store(connect(load_settings(cli.environment))))

    def leave(self) -> None:
        """End what a home has started for itself."""
        stop_embedded(load_settings(self.cli.environment))

    def work(self, **environment: str) -> None:
        """Run a worker until no job is left."""
        self.cli.with_environment(**environment)("worker", "--drain-when-idle", timeout=self.seconds)

    @contextmanager
    def worker(self, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A worker that runs during the block."""
        with (self.folder / "worker.log").open("a") as log:
            command = [str(Path(sys.executable).with_name("loractl")), "worker", *options]
            environment = {**self.cli.environment, **environment}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                yield process
            finally:
                for _ in range(2):
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.3)
                process.wait(timeout=60)

    @contextmanager
    def thief(self, size: int, after_s: float = 0.0) -> Iterator[subprocess.Popen[str]]:
        """Another program that takes this many bytes of the card."""
        process = self.module("thief", self.device, str(size), str(after_s))
        try:
            yield process
        finally:
            process.communicate(timeout=60)  # its input ends

    def module(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """A program of this folder, on the card."""
        command = [sys.executable, "-m", f"tests.gpu.{name}", *arguments]
        environment = {**self.cli.environment, "PYTHONPATH": str(ROOT), **self.of_a_trainer}
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    @property
    def of_a_trainer(self) -> dict[str, str]:
        """What an environment of a trainer has for the card and its allocator."""
        from loractl.worker.attempt.order import device_environment
        from loractl.worker.device.devices import find_devices

        device = find_devices(load_settings(self.cli.environment))[0]
        own = device_environment(device, "", threads=psutil.cpu_count() or 1)
        kept = {name: value for name, value in own.items() if os.environ.get(name) != value and name != JOB_VARIABLE}
        return {**kept, "TOKENIZERS_PARALLELISM": "false"}

    def told(self, name: str, *arguments: str) -> Iterator[dict[str, Any]]:
        """The JSON lines of a program of this folder, as they come. It ends when the time is over."""
        process = self.module(name, *arguments)
        timer = threading.Timer(self.seconds, process.kill)
        timer.start()
        try:
            assert process.stdout
            for line in process.stdout:
                if line.startswith('{"'):  # a library prints other braces
                    yield json.loads(line)
            if process.wait():
                raise RuntimeError(f"tests.gpu.{name} ended with {process.returncode}: what it printed says why")
        finally:
            timer.cancel()
            process.kill()
            process.communicate()

    def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait for it, at most as long as there is time."""
        deadline = time.monotonic() + self.seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"it did not come: {what}")
            time.sleep(0.2)

    def until_job(self, job: int, holds: Callable[[Job], object], what: str) -> None:
        """Wait for it as long as the job has not ended: a job that failed must not cost the other experiments' time."""

        def seen() -> bool:
            row = self.store.jobs.get(job)
            if not holds(row) and row.status.is_terminal:
                raise RuntimeError(f"{row.name} ended before {what}: {row.reason}, {row.message}")
            return bool(holds(row))

        self.until(seen, what)

    def until_over(self, *jobs: int) -> None:
        self.until(lambda: all(self.store.jobs.get(job).status.is_terminal for job in jobs), f"the end of {jobs}")

    def trainer_of(self, job: int) -> psutil.Process:
        """The trainer's process of a running job."""
        module = self.cli.environment.get("LORACTL_TRAINER", TRAINER)
        for process in psutil.process_iter():
            try:
                if process.environ().get(JOB_VARIABLE) == str(job) and module in process.cmdline():
                    return process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        raise ProcessLookupError(f"no trainer of job {job}")

    def outcome(self, job: int) -> Figure:
        """How a job ended, in how many attempts; it must have succeeded in one."""
        row, attempts = self.store.jobs.get(job), self.store.attempts.of_job(job)
        reasons = ", ".join(str(attempt.reason and attempt.reason.value) for attempt in attempts)
        well = row.status is Status.SUCCEEDED and len(attempts) == 1
        return Figure(what=f"{row.name}: attempts", value=f"{reasons} ({row.message})", ok=well)


def make_rig(
    folder: Path, environment: dict[str, str], *, device: str, small: bool, budget_s: float, long: bool = False
) -> Rig:
    """A rig with a new home under `folder`, on the first card of this box."""
    from loractl.worker.device.devices import find_devices

    kind = "nvml" if device == "cuda" else "cpu"
    home = {"LORACTL_HOME": str(folder / "home"), "LORACTL_HOST": "card", "LORACTL_USER": "tester"}
    more = {"HF_HUB_OFFLINE": "1", "LORACTL_DEVICES": kind}
    cli = Cli({**environment, **home, **more})
    cli("db", "upgrade")
    first = find_devices(load_settings(cli.environment))[0]
    return Rig(
        cli=cli,
        store=Store(connect(load_settings(cli.environment))),
        workshop=Workshop(folder=folder / "models", device=device, small=small),
        folder=folder,
        uuid=first.uuid,
        total=first.total,
        deadline=time.monotonic() + budget_s,
        long=long,
    )


def mib(size: int | None) -> str:
    return "–" if size is None else f"{size / MIB:,.0f} MiB"
