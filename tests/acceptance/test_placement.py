"""Which job runs where, on a real worker that trains, and with NVML's real client on a stand-in library.

The rule on simulated cards: tests/unit/worker/test_placement.py.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from loractl.common.job.file import load_spec
from loractl.common.job.method import Method
from loractl.common.job.status import Status
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import largest_fit
from loractl.common.memory.plan import plan
from loractl.common.placement.cards import Card
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB

from ..conftest import Cli
from ..models import make_tiny_model, write_job
from ..nvml import MIB, FakeCard, StandIn, build, compiler

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Lab:
    """A database, a queue and the workers that a test starts; each ends with it.

    What a person would read comes from the command line; waiting for something looks into the store, since a command
    takes a second of a processor that the trainers need.
    """

    cli: Cli
    home: Path
    store: Store
    workers: list[subprocess.Popen[str]]

    def start(self, *options: str, **environment: str) -> None:
        self.workers.append(self.cli.with_environment(**environment).start("worker", *options, warm_start=True))

    def cards(self) -> dict[str, dict]:
        return {row["node"]: row for row in json.loads(self.cli("gpus", "--json").stdout)}

    def job(self, job_id: int) -> dict:
        return json.loads(self.cli("show", job_id, "--json").stdout)

    def why(self, job_id: int) -> dict:
        return json.loads(self.cli("why", job_id, "--json").stdout)

    def submit(self, *arguments: object) -> None:
        self.cli("submit", *arguments)

    def until_cards(self, count: int, holds: Callable[[Card], object] = lambda card: card.open) -> None:
        def seen() -> dict[str, Card]:
            return self.store.fleet().cards

        _until(seen, lambda cards: len(cards) == count and all(map(holds, cards.values())), 60)

    def until_job(self, job_id: int, holds: Callable[[Job], object], seconds: float = 120) -> dict:
        def seen() -> Job:
            return self.store.job(job_id)

        _until(seen, holds, seconds, lambda job: f"{job.status} {job.reason} {job.message}")
        return self.job(job_id)


@pytest.fixture
def lab(make_cli: Callable[..., Cli], home: Path) -> Iterator[Lab]:
    cli = make_cli(LORACTL_HOST="heron")
    found = Lab(cli, home, Store(connect(load_settings(cli.environment))), [])
    yield found
    for process in found.workers:
        _kill(process)


def test_one_job_trains_with_qlora_on_the_small_card_while_another_does_with_lora_on_the_large_one(
    lab: Lab, tmp_path: Path
) -> None:
    # Not 8 and 24 GiB: a model that a processor trains in seconds needs half a GiB, nearly all of it a CUDA context.
    # So the cards are cut to the job: the small one holds its QLoRA plan and not its LoRA plan.
    model, config_alone = make_tiny_model(tmp_path / "model", hidden=512, layers=4), tmp_path / "config-alone"
    config_alone.mkdir()
    shutil.copy(model / "config.json", config_alone)
    jobs = [_small(write_job(tmp_path, model, name=f"auto-{n}", method="auto")) for n in range(2)]
    plans = _plan(lab, _small(write_job(tmp_path, config_alone, name="plan", method="auto")))
    small, large = (plans["qlora"] + plans["lora"]) // 2, plans["lora"]
    assert plans["qlora"] < small < large
    lab.start("--reserve", "0", LORACTL_DEVICES=f"sim:{small}B,{large}B")
    lab.until_cards(2)
    lab.submit(*jobs)
    done = [lab.until_job(n, lambda job: job.status is Status.SUCCEEDED, seconds=180) for n in (1, 2)]
    assert [_placed(job) for job in done] == [
        [("heron:1", "lora", plans["lora"])],
        [("heron:0", "qlora", plans["qlora"])],
    ]
    assert {json.loads(lab.cli("report", n, "--json").stdout)["method"] for n in (1, 2)} == {"lora", "qlora"}
    why = [event["text"] for event in done[1]["events"] if event["kind"] == "started"]
    assert why == ["attempt 1 started on heron:0 with qlora (auto: lora does not fit)"]


def test_other_people_s_programs_are_respected_named_and_waited_for(lab: Lab, tiny_model: Path, tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C compiler for the NVML stand-in")
    library = build(tmp_path)
    job = _job_of_size(tmp_path, tiny_model, "small", 4 * GIB)
    with subprocess.Popen(["sleep", "300"]) as notebook:
        try:
            _respected(lab, library, job, notebook.pid)
        finally:
            notebook.kill()


def _respected(lab: Lab, library: StandIn, job: Path, pid: int) -> None:
    other = FakeCard(uuid="GPU-aaaa", total=81920)
    free = FakeCard(uuid="GPU-bbbb", total=24576, load=7, temperature=41, name="NVIDIA A10")
    taken = FakeCard(**{**vars(free), "processes": ((pid, 20480),)})
    library.show(other, free)
    lab.start(
        "--gpus", "1", "--reserve", "2GiB", "--high-water", "8s",
        LORACTL_DEVICES="nvml:cpu", CUDA_VISIBLE_DEVICES="GPU-bbbb", **library.environment(),
    )  # fmt: skip
    lab.until_cards(1)
    cards = lab.cards()
    assert list(cards) == ["heron:1"], "the first card was neither asked for nor given by the scheduler"
    card = cards["heron:1"]
    assert (card["total"], card["margin"], card["free"]) == (24 * GIB, 2 * GIB, 22 * GIB)
    assert (card["gpu"], card["device_name"], card["load"], card["temperature"]) == ("GPU-bbbb", "NVIDIA A10", 7, 41)

    library.show(other, taken)
    lab.until_cards(1, lambda card: card.outside > 0)
    held = lab.cards()["heron:1"]
    user = psutil.Process().username()
    assert held["outside"] == [{"pid": pid, "user": user, "name": "sleep", "bytes": 20480 * MIB}]
    assert held["free"] == 2 * GIB
    assert f"sleep of {user}" in lab.cli("gpus").stdout

    lab.submit(job)
    waiting = lab.why(1)
    assert (waiting["tier"], waiting["word"]) == ("capacity", "memory")
    assert waiting["sentence"] == f"sleep of {user} (pid {pid}) holds 20.0 on heron:1, 2.0 are left"
    assert f"It would fit now on heron:1 without sleep of {user}" in lab.cli("why", 1).stdout
    time.sleep(3)
    assert lab.job(1)["attempts"] == [], "it does not fit beside them"

    library.show(other, free)
    left = time.time()
    done = lab.until_job(1, lambda job: job.status is Status.SUCCEEDED, seconds=120)
    assert [(node, method) for node, method, _ in _placed(done)] == [("heron:1", "lora")]
    waited = dt.datetime.fromisoformat(done["attempts"][0]["started_at"]).timestamp() - left
    # Looks are 5 s apart: what was there at the last one before it left stays for 8 s.
    assert waited > 2, f"it started {waited:.1f} s after they had left, while the card was still theirs"


# --- jobs ---


def _small(job: Path) -> Path:
    """The job with the fewest steps and no answers to generate: a processor is slow with NF4."""
    text = job.read_text().replace("max_steps: 6", "max_steps: 2").replace("samples: 2", "samples: 0")
    job.write_text(text.replace("per_device_train_batch_size: 4", "per_device_train_batch_size: 1"))
    return job


def _job_of_size(folder: Path, model: Path, name: str, size: int) -> Path:
    """A job whose plan is `size` bytes or a little less."""
    job = write_job(folder, model, name=name)
    job.write_text(job.read_text().replace("max_length: 128", "max_length: 512"))
    shape, spec = read_shape(str(model)), load_spec(job)
    assert shape is not None
    batch = largest_fit(shape, spec, Method.LORA, size).micro_batch
    job.write_text(job.read_text().replace("train_batch_size: 4", f"train_batch_size: {batch}"))
    assert 0.95 * size < plan(shape, load_spec(job), Method.LORA).need_bytes <= size
    return job


def _plan(lab: Lab, job: Path) -> dict[str, int]:
    """Bytes by method as submit will reserve them on cards: without a tokenizer every row counts as max_length."""
    shown = json.loads(lab.cli("plan", job, "--gpu", "80GiB", "--json").stdout)
    assert shown["lengths"] is None
    return {method: one["reserved_bytes"] for method, one in shown["methods"].items()}


# --- what happened ---


def _placed(job: dict) -> list[tuple[str, str, int]]:
    return [(a["node"], a["method"], a["vram_reserved"]) for a in job["attempts"]]


def _until(
    look: Callable[[], Seen],
    holds: Callable[[Seen], object],
    seconds: float,
    say: Callable[[Seen], str] = str,
) -> Seen:
    """What `look` shows once `holds` is true of it."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if holds(seen):
            return seen
        assert time.monotonic() < deadline, f"after {seconds} s: {say(seen)}"
        time.sleep(0.2)


def _kill(worker: subprocess.Popen[str]) -> None:
    """End a worker and all its processes, at once."""
    try:
        tree = psutil.Process(worker.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    worker.kill()
    worker.wait()
    for process in tree:
        if process.is_running():
            process.kill()
