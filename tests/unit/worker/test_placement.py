"""Which job runs where, in a held lab of simulated cards: the rule, the claims and what people read of them.

NVML's real client: test_devices.py.
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
from pathlib import Path

import psutil

from loractl.common.job.file import load_spec
from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Status
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import largest_fit
from loractl.common.memory.plan import plan
from loractl.common.units import GIB
from loractl.worker.device.snapshot import Process
from loractl.worker.node.monitor import SEE_S, NodeOptions

from ...held_lab import HeldLab, ShownCard
from ...models import write_job

MARGIN = GIB // 2
"""What a worker keeps free of each card unless told otherwise."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
SIZES = {
    "3B": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Llama 3's own numbers: a plan needs a config.json and no weights."""


def test_a_small_card_gets_qlora_and_a_job_too_large_waits_for_a_larger_card(held: HeldLab) -> None:
    files = {size: _llama_job(held.folder, size) for size in SIZES}
    plans = {size: _plan(held, file) for size, file in files.items()}
    assert plans["3B"]["qlora"] < 8 * GIB - MARGIN < plans["3B"]["lora"], "the sizes that this test is about"
    assert plans["8B"]["lora"] < 24 * GIB - MARGIN < plans["70B"]["qlora"] < 80 * GIB - MARGIN

    held.start(LORACTL_DEVICES="sim:8GiB,24GiB")
    held.submit_file(files["70B"], "method=qlora")
    held.submit_file(files["8B"], "training.max_steps=200")  # a job holds its card until the other one has the next
    held.submit_file(files["3B"], "training.max_steps=200")
    waiting = _why(held, 1)
    assert (waiting["tier"], waiting["word"]) == ("never", "never")
    assert waiting["sentence"] == f"needs {plans['70B']['qlora'] / GIB:.1f} GiB, and the largest card has 23.5 GiB"
    assert {card["when"] for card in waiting["cards"]} == {"never"}
    (row,) = [row for row in json.loads(held.cli("status", "--json")) if row["job_id"] == 1]
    assert row["message"] == f"never: {waiting['sentence']}"
    assert "never" in held.cli("status")

    for job_id in (2, 3):
        held.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert _placed(held, 2) == [("heron:1", "lora", plans["8B"]["lora"])]
    assert _placed(held, 3) == [("heron:0", "qlora", plans["3B"]["qlora"])]
    why = [event.text for event in held.store.jobs.events(3) if event.kind == "started"]
    assert why == ["attempt 1 started on heron:0 with qlora (auto: lora does not fit)"]
    assert held.store.jobs.get(1).status is Status.QUEUED

    held.start_box("osprey", LORACTL_DEVICES="sim:80GiB")
    held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert _placed(held, 1) == [("osprey:0", "qlora", plans["70B"]["qlora"])]
    assert {row.node for row in held.store.cards.nodes()} == {"heron:0", "heron:1", "osprey:0"}


def test_jobs_share_a_large_card_and_never_reserve_more_than_it_has(held: HeldLab) -> None:
    sizes = [GIB * size for size in (19.9, 9.9, 19.9, 9.9, 19.9, 9.9)]
    files = [_job_of_size(held.folder, held.folder, f"job-{n}", int(size)) for n, size in enumerate(sizes)]
    room = 80 * GIB - MARGIN
    held.start(options=NodeOptions(max_jobs=8), LORACTL_DEVICES="sim:80GiB")
    for file in files:
        held.submit_file(file, "training.max_steps=40")
    polled: list[int] = []

    def unfinished() -> int:
        card = held.store.cards.fleet().cards["heron:0"]
        polled.append(sum(job.reserved for job in card.running))
        assert card.free == room - polled[-1] >= 0
        return len(held.store.jobs.matching(statuses=[Status.QUEUED, Status.RUNNING]))

    while unfinished() > 4:
        held.clock.sleep(0.1)
    ((shown,),) = [json.loads(held.cli("gpus", "--json"))]
    assert sum(job["reserved"] for job in shown["jobs"]) == room - shown["free"] <= room
    deadline = held.clock.now() + 180
    while unfinished():
        assert held.clock.now() < deadline
        held.clock.sleep(0.1)
    jobs = [json.loads(held.cli("status", n, "--json")) for n in range(1, 7)]
    assert [job["status"] for job in jobs] == ["succeeded"] * 6
    most, at_once = _ledger(jobs)
    assert most <= room, "what all attempts held at one moment, by their own rows"
    assert most > 0.7 * room and at_once >= 4, "otherwise nothing was shared"
    assert max(polled) > 0


def test_other_people_s_programs_are_respected_named_and_waited_for(held: HeldLab) -> None:
    card, high_water_s = ShownCard(number="1", uuid="GPU-bbbb", name="NVIDIA A10", load=7, temperature=41), 120.0
    job = _job_of_size(held.folder, held.folder, "small", 4 * GIB)
    held.start(options=NodeOptions(margin=2 * GIB, high_water_s=high_water_s), devices=[card], LORACTL_LEASE="60s")
    (free,) = json.loads(held.cli("gpus", "--json"))
    assert (free["node"], free["total"], free["margin"], free["free"]) == ("heron:1", 24 * GIB, 2 * GIB, 22 * GIB)
    assert (free["gpu"], free["device_name"], free["load"], free["temperature"]) == ("GPU-bbbb", "NVIDIA A10", 7, 41)

    with subprocess.Popen(["sleep", "300"]) as notebook:
        try:
            card.processes = (Process(pid=notebook.pid, bytes=20 * GIB),)
            held.clock.sleep(2 * SEE_S)
            (taken,) = json.loads(held.cli("gpus", "--json"))
            user = psutil.Process().username()
            assert taken["outside"] == [{"pid": notebook.pid, "user": user, "name": "sleep", "bytes": 20 * GIB}]
            assert taken["free"] == 2 * GIB
            assert f"sleep of {user}" in held.cli("gpus")

            held.submit_file(job)
            waiting = _why(held, 1)
            assert (waiting["tier"], waiting["word"]) == ("capacity", "memory")
            told = f"heron:1 has 2.0 GiB left: sleep of {user} (pid {notebook.pid}) holds 20.0 GiB"
            assert waiting["sentence"] == told
            assert f"heron:1 has 2.0 GiB left: sleep of {user} (pid " in held.cli("why", 1)
            held.clock.sleep(60)
            assert held.store.attempts.of_job(1) == [], "it does not fit beside them"
        finally:
            notebook.kill()
    card.processes = ()
    left = held.clock.now()
    held.until(1, lambda job: job.started_at is not None, seconds=200)
    waited = held.clock.now() - left
    assert high_water_s - 2 * SEE_S < waited < high_water_s + 4 * SEE_S, "their room stays theirs for a while"
    held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert [(node, method) for node, method, _ in _placed(held, 1)] == [("heron:1", "lora")]


def test_a_drained_box_says_so_gives_its_jobs_back_when_told_and_goes_on_where_they_were(held: HeldLab) -> None:
    held.start(LORACTL_LEASE="60s")
    held.cli("drain", "heron", "--reason", "replacing a fan", "--until", "2h")
    held.submit("--set=training.save_steps=100000", steps=100000)
    waiting = _why(held, 1)
    assert (waiting["tier"], waiting["word"]) == ("fleet", "drained")
    assert waiting["sentence"].startswith("heron:0 is drained by tester until ")
    assert waiting["sentence"].endswith(": replacing a fan")
    assert "drained by tester until " in held.cli("why", 1)
    assert "drained by tester until" in held.cli("gpus")
    held.clock.sleep(60)
    assert held.store.attempts.of_job(1) == []

    held.cli("undrain", "heron")
    held.until(1, lambda job: (job.step or 0) >= 5)
    held.cli("drain", "heron:0", "--reason", "driver", "--now")
    held.until(1, lambda job: job.status is Status.QUEUED)
    (first,) = held.store.attempts.of_job(1)
    assert (first.reason, first.message) == ("drained", "heron:0 is drained by tester: driver")
    assert _why(held, 1)["word"] == "drained"
    assert not held.store.cards.fleet().cards["heron:0"].running

    held.cli("undrain", "heron:0")
    held.until(1, lambda job: job.attempt == 2 and (job.step or 0) > 0)
    assert (held.store.attempts.of_job(1)[1].resumed_from_step or 0) >= 5
    held.cli("cancel", 1)
    held.until(1, lambda job: job.status is Status.CANCELLED)


def test_a_drained_card_trains_its_job_to_the_end_and_takes_no_other(held: HeldLab) -> None:
    held.start(LORACTL_LEASE="60s")
    held.submit(steps=600)
    held.until(1, lambda job: (job.step or 0) >= 5)
    held.cli("drain", "heron", "--reason", "replacing a fan")
    held.submit(steps=5)
    held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert held.reasons(1) == [Reason.OK], "in one attempt"
    held.clock.sleep(60)
    assert held.store.attempts.of_job(2) == []


def _why(lab: HeldLab, job_id: int) -> dict:
    return json.loads(lab.cli("why", job_id, "--json"))


def _llama_job(folder: Path, size: str) -> Path:
    model = folder / size
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**LLAMA, **SIZES[size]}))
    job = write_job(folder, model, name=f"llama-{size}", method="auto")
    job.write_text(job.read_text().replace("max_length: 128", "max_length: 512"))
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


def _plan(lab: HeldLab, job: Path) -> dict[str, int]:
    """Bytes by method as submit will reserve them on cards: without a tokenizer every row counts as max_length."""
    shown = json.loads(lab.cli("plan", job, "--gpu", "80GiB", "--json"))
    assert shown["lengths"] is None
    return {method: one["reserved_bytes"] for method, one in shown["methods"].items()}


def _placed(lab: HeldLab, job_id: int) -> list[tuple[str, str, int | None]]:
    return [(a.node, a.method, a.vram_reserved) for a in lab.store.attempts.of_job(job_id)]


def _ledger(jobs: list[dict]) -> tuple[int, int]:
    """The most bytes, and the most attempts, at one moment: from attempts, and what a better plan gave back."""
    changes = []
    for job in jobs:
        for attempt in job["attempts"]:
            begun, ended = (dt.datetime.fromisoformat(attempt[key]) for key in ("started_at", "ended_at"))
            changes.append((begun, 1, attempt["vram_reserved"]))
            changes.append((ended, -1, -attempt["vram_reserved"]))
    most = at_once = reserved = running = 0
    for _, one, size in sorted(changes):  # at one moment ends come before starts
        reserved, running = reserved + size, running + one
        most, at_once = max(most, reserved), max(at_once, running)
    return int(most), at_once
