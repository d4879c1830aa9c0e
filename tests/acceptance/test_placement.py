"""The job's method is the one that its card has room for: on a real worker of simulated cards, with real trainings.

The rule itself: tests/unit/worker/test_placement.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loractl.common.job.status import Status
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import make_tiny_model, write_job
from ..waiting import until_job


@pytest.mark.long
def test_one_job_trains_with_qlora_on_the_small_card_while_another_does_with_lora_on_the_large_one(
    make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    # Not 8 and 24 GiB: a model that a processor trains in seconds needs half a GiB, nearly all of it a CUDA context.
    # So the cards are cut to the job: the small one holds its QLoRA plan, not what recomputing every second block
    # takes, and not its LoRA plan; the large one holds LoRA without recomputing, too.
    model, config_alone = make_tiny_model(tmp_path / "model", hidden=512, layers=4), tmp_path / "config-alone"
    config_alone.mkdir()
    shutil.copy(model / "config.json", config_alone)
    jobs = [_small(write_job(tmp_path, model, name=f"auto-{n}", method="auto")) for n in range(2)]
    cli = make_cli(LORACTL_HOST="heron")
    plans = _plan(cli, _small(write_job(tmp_path, config_alone, name="plan", method="auto")))
    small, large = plans["qlora"] + 2**20, plans["lora, roomy"]
    assert plans["qlora"] < small < plans["lora"] < large
    box = cli.with_environment(LORACTL_DEVICES=f"sim:{small}B,{large}B")
    worker, store = (
        box.start("worker", "--reserve", "0", warm_start=True),
        Store(connect(load_settings(cli.environment))),
    )
    try:
        while len(store.cards.nodes()) < 2:
            time.sleep(0.1)
        cli("submit", *jobs)
        for number in (1, 2):
            until_job(cli, number, lambda job: job.status is Status.SUCCEEDED, seconds=180)
    finally:
        worker.terminate()
        worker.communicate(timeout=60)
    done = [json.loads(cli("show", n, "--json").stdout) for n in (1, 2)]
    assert [(job["status"], _placed(job)) for job in done] == [
        ("succeeded", [("heron:1", "lora", plans["lora, roomy"])]),
        ("succeeded", [("heron:0", "qlora", plans["qlora"])]),
    ]
    assert [json.loads(cli("report", n, "--json").stdout)["method"] for n in (1, 2)] == ["lora", "qlora"]
    why = [event["text"] for job in done for event in job["events"] if event["kind"] == "started"]
    assert why[0].startswith("attempt 1 started on heron:1 with lora (auto: it fits), without recomputing: ")
    assert why[1] == "attempt 1 started on heron:0 with qlora (auto: lora does not fit)"
    assert [job["attempts"][0]["roomy"] for job in done] == [True, False]


def _small(job: Path) -> Path:
    """The job with the fewest steps and no answers to generate: a processor is slow with NF4."""
    text = job.read_text().replace("max_steps: 6", "max_steps: 2").replace("samples: 2", "samples: 0")
    job.write_text(text.replace("per_device_train_batch_size: 4", "per_device_train_batch_size: 1"))
    return job


def _placed(job: dict) -> list[tuple[str, str, int]]:
    return [(a["node"], a["method"], a["vram_reserved"]) for a in job["attempts"]]


def _plan(cli: Cli, job: Path) -> dict[str, int]:
    """Bytes by method as submit will reserve them on cards: without a tokenizer every row counts as max_length."""
    shown = json.loads(cli("plan", job, "--gpu", "80GiB", "--json").stdout)
    assert shown["lengths"] is None
    plans = {method: one["reserved_bytes"] for method, one in shown["methods"].items()}
    return plans | {f"{method}, roomy": one["roomy"][0]["bytes"] for method, one in shown["methods"].items()}
