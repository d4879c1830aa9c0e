"""What people ask for while faults are active: edits, holds, retries, tags, sweeps, gc, and jobs of high priority."""

from __future__ import annotations

import datetime as dt
import math
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from loractl.common.errors import LoractlError
from loractl.common.job.names import Reference
from loractl.common.job.status import Status
from loractl.common.store.database import REFUSALS
from loractl.common.store.store import Store
from loractl.common.store.tables import Job

from .history import Act
from .lab import LORACTL, REPO, Lab

if TYPE_CHECKING:
    from .faults import Injector

Thing = TypeVar("Thing")

DECK = {
    "edit": 5,
    "raise": 4,
    "hold": 3,
    "retry": 3,
    "tag": 3,
    "sweep": 2,
    "cancel a sweep": 1,
    "gc": 1,
    "a long job": 1,
}
"""How often each comes in one deck, as with the faults."""

HIGH = 9
"""The priority of a job that is raised: most others have none."""

SETTLED = dt.timedelta(seconds=5)
"""A job that has ended so long ago is retried: whoever has cancelled it has been told so by then."""

COMMAND_S = 60

LEARNING_RATES = "1e-4,1e-3,1e-2"

USER = "dee"

SWEPT = "tuned"
"""The name of every sweep's job file, so that gc finds older results of its members."""


@dataclass
class People:
    """Asks for one thing after the other, and notes what was asked and what was answered."""

    lab: Lab
    store: Store
    injector: Injector
    seed: int
    gap_s: float
    acts: list[Act] = field(default_factory=list)
    holding: set[int] = field(default_factory=set)  # jobs that nobody else may release
    printed: list[int] = field(default_factory=list)  # members of sweeps
    done: threading.Event = field(default_factory=threading.Event)
    _releases: list[tuple[float, int]] = field(default_factory=list)  # when, and which job
    _sweeps: list[int] = field(default_factory=list)  # which nobody has cancelled

    def work(self, over: threading.Event, stop: threading.Event) -> None:
        """Until it is over; then nothing is held any more. `stop`: the run is given up."""
        rng = random.Random(self.seed)
        asks: dict[str, Callable[[random.Random], None]] = {
            "edit": self._edit, "raise": self._raise, "hold": self._hold, "retry": self._retry, "tag": self._tag,
            "sweep": self._sweep, "cancel a sweep": self._cancel_sweep, "gc": self._gc, "a long job": self._long,
        }  # fmt: skip
        for kind in _deal(rng):
            if over.wait(rng.uniform(0.3, 1.7) * self.gap_s):
                break
            self._release(time.monotonic())
            try:
                asks[kind](rng)
            except REFUSALS:  # the database is away: nobody was told anything
                continue
        while self._releases and not stop.wait(0.2):
            self._release(math.inf)
        self.done.set()

    def _ask(self, kind: str, job_id: int, work: Callable[[], object], *, key: str = "", value: float = 0) -> bool:
        """Note what was asked, and whether it was acknowledged. What is refused changes nothing, and isn't noted."""
        asked_at, acknowledged = _now(), False
        try:
            work()
            acknowledged = True
        except LoractlError:
            return False
        except REFUSALS:
            pass
        self.acts.append(
            Act(
                kind=kind, job_id=job_id, asked_at=asked_at, over_at=_now(), acknowledged=acknowledged, key=key,
                value=value,
            )
        )  # fmt: skip
        return acknowledged

    def _edit(self, rng: random.Random) -> None:
        """Of a job that waits or runs its time limit; of one that was never begun how long it trains."""
        job = _any(rng, self.store.jobs.matching(statuses=[Status.RUNNING, Status.QUEUED]))
        if job is None:
            return
        begun = job.status is Status.RUNNING or job.attempt or job.sweep_id is not None
        if begun or rng.random() < 0.4:
            self._change(job, "resources.time_limit", rng.randint(1800, 7200))
        else:
            self._change(job, "training.max_steps", rng.randint(4, 60))

    def _raise(self, rng: random.Random) -> None:
        """Let a waiting job go before all others: where none makes room for it, one that may gives way."""
        waiting = [
            job
            for job in self.store.jobs.matching(statuses=[Status.QUEUED])
            if job.awaits is None and not job.held and job.priority < HIGH
        ]
        if (job := _any(rng, waiting)) is not None:
            self._change(job, "priority", HIGH)

    def _change(self, job: Job, key: str, value: int) -> None:
        from loractl.scheduler.change.amendment import amendment

        def work() -> None:
            self.store.jobs.edit(amendment(self.store, job.job_id, [f"{key}={value}"]), USER)

        self._ask("edit", job.job_id, work, key=key, value=value)

    def _hold(self, rng: random.Random) -> None:
        waiting = [
            job for job in self.store.jobs.matching(statuses=[Status.QUEUED]) if job.awaits is None and not job.held
        ]
        if (job := _any(rng, waiting)) is None:
            return
        self.holding.add(job.job_id)  # first: else who looks after held jobs finds it
        if self._ask("hold", job.job_id, lambda: self.store.jobs.hold(job.job_id, USER, "chaos")):
            self._releases.append((time.monotonic() + rng.uniform(0.5, 2.5) * self.lab.lease_s, job.job_id))
        else:
            self.holding.discard(job.job_id)

    def _release(self, now: float) -> None:
        for due in list(self._releases):
            if due[0] > now:
                continue
            try:
                job = self.store.jobs.get(due[1])
            except REFUSALS:
                continue
            waits = job.status is Status.QUEUED and job.held  # it may have been cancelled, or was released unheard
            if not waits or self._ask("retry", due[1], lambda due=due: self.store.jobs.release(due[1], USER)):
                self._releases.remove(due)
                self.holding.discard(due[1])

    def _retry(self, rng: random.Random) -> None:
        """Of a job that was cancelled, failed, or was stopped by its sweep: once each."""
        settled, again = _now() - SETTLED, {act.job_id for act in self.acts if act.kind == "retry"}
        ended = self.store.jobs.matching(statuses=[Status.CANCELLED, Status.FAILED])
        ended = [job for job in ended if job.job_id not in again and job.ended_at and job.ended_at < settled]
        if (job := _any(rng, ended)) is not None:
            self._ask("retry", job.job_id, lambda: self.store.jobs.retry(job.job_id, USER))

    def _tag(self, rng: random.Random) -> None:
        """Every second time an adapter that gc may find to be an older one."""
        adapters = self.store.adapters.all()
        swept = [one for one in adapters if one.name.startswith(SWEPT)]
        if (one := _any(rng, swept if swept and rng.random() < 0.5 else adapters)) is not None:
            tag = f"chaos-{len(self.acts)}"
            self._ask("tag", one.job_id, lambda: self.store.adapters.tag(Reference(job_id=one.job_id), tag, USER))

    def _sweep(self, rng: random.Random) -> None:
        """With rungs; a sweep whose number nobody has seen runs all the same."""
        folder = self.lab.folder / "jobs"
        steps = rng.choice((20, 40, 80))
        file = folder / f"{SWEPT}.yaml"
        file.write_text(
            f"name: {SWEPT}\nbase_model: {folder / 'model-0'}\nmethod: lora\n"
            f"dataset: {{path: {folder / 'data-0.jsonl'}, max_length: 16}}\n"
            f"training: {{max_steps: {steps}, save_steps: 5, per_device_train_batch_size: 1}}\n"
            "max_retries: 2\npreemptible: true\n"
        )
        said = self._command("sweep", str(file), "--set", f"training.learning_rate={LEARNING_RATES}", "--early-stop")
        if (found := re.search(r"^Sweep (\d+): \d+ jobs \((\d+) to (\d+)\)", said, re.MULTILINE)) is not None:
            self._sweeps.append(int(found[1]))
            self.printed += range(int(found[2]), int(found[3]) + 1)

    def _long(self, rng: random.Random) -> None:
        """A job of 25 s, which yields its card to those of a few."""
        folder = self.lab.folder / "jobs"
        file = folder / "long.yaml"
        file.write_text(
            f"name: long\nbase_model: {folder / 'model-0'}\nmethod: lora\n"
            f"dataset: {{path: {folder / 'data-0.jsonl'}, max_length: 16}}\n"
            "training: {max_steps: 500, save_steps: 5, per_device_train_batch_size: 1}\n"
            "max_retries: 2\n"
        )
        if (found := re.search(r"^Job (\d+) ", self._command("submit", str(file)), re.MULTILINE)) is not None:
            self.printed.append(int(found[1]))

    def _cancel_sweep(self, rng: random.Random) -> None:
        """As a whole; members may end just then."""
        if not self._sweeps:
            return
        sweep_id = self._sweeps.pop()
        self.injector.asked |= {member.job_id for member in self.store.sweeps.get(sweep_id).members}
        try:
            gone = self.store.sweeps.cancel(sweep_id, USER)
        except LoractlError:  # all have ended
            return
        self.injector.cancelled.update({job.job_id: _now() for job in gone})

    def _gc(self, rng: random.Random) -> None:
        asked_at = _now()
        said = self._command("gc", "--keep-last", "1", around=self.lab.boxes[0].environment)  # a person's login may not
        self.acts.append(Act(kind="gc", job_id=0, asked_at=asked_at, over_at=_now(), acknowledged=bool(said)))

    def _command(self, *arguments: str, around: dict[str, str] | None = None) -> str:
        """What it printed; empty where it failed."""
        try:
            done = subprocess.run(
                [LORACTL, *arguments], env={**(around or self.lab.environment), "LORACTL_USER": USER}, cwd=REPO,
                capture_output=True, text=True, timeout=COMMAND_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout if done.returncode == 0 else ""


def _deal(rng: random.Random) -> Iterator[str]:
    while True:
        deck = [kind for kind, count in DECK.items() for _ in range(count)]
        rng.shuffle(deck)
        yield from deck


def _any(rng: random.Random, things: Sequence[Thing]) -> Thing | None:
    return rng.choice(things) if things else None


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
