"""Jobs that train in one process on a real worker: what comes out is what each leaves alone, also when it is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from loractl.common.store.tables import Job

from ..conftest import Cli
from ..models import make_tiny_model, write_helpdesk
from ..waiting import until_job

PATIENCE_S = 900
"""For some hundred steps of two jobs: beside other work on two cores 240 were too few."""

KILLS = 3
STEPS = 300


def _job(folder: Path, steps: int) -> Path:
    make_tiny_model(folder / "model", layers=3, hidden=128)
    write_helpdesk(folder / "data.jsonl", rows=60)
    (folder / "packed.yaml").write_text(
        f"name: packed\npreemptible: true\nbase_model: {folder / 'model'}\nmethod: lora\n"
        "dataset: {path: data.jsonl, max_length: 128, test_size: 0.1}\nlora: {r: 4, lora_dropout: 0.1}\n"
        f"training: {{max_steps: {steps}, per_device_train_batch_size: 2, gradient_accumulation_steps: 1, "
        "save_steps: 5, logging_steps: 5}\nevaluation: {samples: 1, max_new_tokens: 4}\n"
    )
    return folder / "packed.yaml"


@pytest.mark.cold
@pytest.mark.long
def test_jobs_that_shared_a_process_which_was_killed_three_times_end_as_each_does_alone(
    make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    """A job is tried alone after such a kill. So each of the two gives way to the other then, and they share again."""
    cli, lines = make_cli(), list[str]()
    job = _job(tmp_path, steps=STEPS)
    cli("sweep", job, "--set", "training.seed=1,2")
    worker = cli.start("worker", "--keep-warm", "5min")
    assert worker.stdout
    out = worker.stdout
    threading.Thread(target=lambda: lines.extend(out), daemon=True).start()
    both, killed = (1, 2), set[int]()
    try:
        for kill in range(KILLS):
            shared = partial(_runs, attempt=2 * kill + 1)
            for n in both:  # one that is killed again and again without a further checkpoint is held
                begun = until_job(cli, n, shared, seconds=PATIENCE_S)
                until_job(cli, n, lambda job: _saved(job) > _saved(begun), seconds=PATIENCE_S)  # noqa: B023
            for n in both:  # now: none has ended meanwhile
                until_job(cli, n, shared, seconds=0)
            (host,) = _trainers(worker.pid)
            os.kill(host, signal.SIGKILL)
            killed.add(host)
            if kill < KILLS - 1:
                _let_both_run_alone(cli, attempt=2 * kill + 2)
        jobs = [until_job(cli, n, lambda job: job.status == "succeeded", seconds=PATIENCE_S) for n in both]
        assert [(job.retries_used, job.attempt) for job in jobs] == [(0, 2 * KILLS)] * 2, "\n".join(lines)
        assert len(killed) == KILLS
        assert all(len(re.findall(r"\d s +host_lost", cli("show", n).stdout)) == KILLS for n in both)
        for seed in both:
            cli("submit", job, f"--set=training.seed={seed}", "--set=resources.exclusive=true")
        for seed, ours in zip((3, 4), jobs, strict=True):
            alone = until_job(cli, seed, lambda job: job.status == "succeeded", seconds=PATIENCE_S)
            assert _weights(alone.adapter_uri) == _weights(ours.adapter_uri)
    finally:
        worker.kill()
        worker.wait()


def _let_both_run_alone(cli: Cli, attempt: int) -> None:
    """The first one does in this attempt, gives way to the second, and that to the first one."""
    for running, waiting, rise in ((1, 2, 0), (2, 1, 1)):
        until_job(cli, running, partial(_runs, attempt=attempt), seconds=PATIENCE_S)
        cli("edit", waiting, f"--set=priority={attempt + rise}")


def _runs(job: Job, attempt: int) -> bool:
    return job.status == "running" and job.attempt == attempt


def _saved(job: Job) -> int:
    """The step of its last checkpoint."""
    return 0 if job.checkpoint is None else int(job.checkpoint["step"])


def _trainers(worker: int) -> list[int]:
    found = []
    for one in psutil.Process(worker).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends meanwhile
            if "loractl.worker.recipe.trainer" in one.cmdline() and "LORACTL_JOB" in one.environ():
                found.append(one.pid)
    return found


def _weights(uri: str | None) -> bytes:
    assert uri is not None
    return (Path(uri.removeprefix("file://")) / "adapter_model.safetensors").read_bytes()
