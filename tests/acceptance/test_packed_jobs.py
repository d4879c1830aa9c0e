"""Jobs that train in one process on a real worker: what comes out is what each leaves alone, also when it is killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ..conftest import Cli
from ..models import make_tiny_model, write_helpdesk
from ..waiting import until_job

PATIENCE_S = 900
"""For 300 steps of two jobs: beside other work on two cores 240 were too few."""


def _job(folder: Path, steps: int) -> Path:
    make_tiny_model(folder / "model", layers=3, hidden=128)
    write_helpdesk(folder / "data.jsonl", rows=60)
    (folder / "packed.yaml").write_text(
        f"name: packed\nbase_model: {folder / 'model'}\nmethod: lora\n"
        "dataset: {path: data.jsonl, max_length: 128, test_size: 0.1}\nlora: {r: 4, lora_dropout: 0.1}\n"
        f"training: {{max_steps: {steps}, per_device_train_batch_size: 2, gradient_accumulation_steps: 1, "
        "save_steps: 20, logging_steps: 5}\nevaluation: {samples: 1, max_new_tokens: 4}\n"
    )
    return folder / "packed.yaml"


@pytest.mark.cold
@pytest.mark.long
def test_a_sweep_trains_in_one_process_and_a_killed_one_gives_its_jobs_back(
    make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    cli, lines = make_cli(), list[str]()
    job = _job(tmp_path, steps=300)
    cli("sweep", job, "--set", "training.seed=1,2")
    worker = cli.start("worker", "--keep-warm", "5min")
    assert worker.stdout
    out = worker.stdout
    threading.Thread(target=lambda: lines.extend(out), daemon=True).start()
    try:
        until_job(cli, 1, lambda job: job.step and job.step > 1, seconds=120)
        until_job(cli, 2, lambda job: job.checkpoint is not None, seconds=120)
        (host,) = _trainers(worker.pid)
        assert "joins the trainer" in cli("logs", 2).stdout
        os.kill(host, signal.SIGKILL)
        jobs = [until_job(cli, n, lambda job: job.status == "succeeded", seconds=PATIENCE_S) for n in (1, 2)]
        assert [(job.retries_used, job.attempt) for job in jobs] == [(0, 2), (0, 2)], "\n".join(lines)
        assert "shared its trainer with another job" in cli("show", 1).stdout
        for seed in (1, 2):
            cli("submit", job, f"--set=training.seed={seed}", "--set=resources.exclusive=true")
        for seed, ours in zip((3, 4), jobs, strict=True):
            alone = until_job(cli, seed, lambda job: job.status == "succeeded", seconds=PATIENCE_S)
            assert _weights(alone.adapter_uri) == _weights(ours.adapter_uri)
    finally:
        worker.kill()
        worker.wait()


def _trainers(worker: int) -> list[int]:
    every = psutil.Process(worker).children(recursive=True)
    found = [one for one in every if "loractl.worker.recipe.trainer" in one.cmdline()]
    return [one.pid for one in found if "LORACTL_JOB" in one.environ()]


def _weights(uri: str | None) -> bytes:
    assert uri is not None
    return (Path(uri.removeprefix("file://")) / "adapter_model.safetensors").read_bytes()
