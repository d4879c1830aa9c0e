"""A finished job runs again from what is stored of it, and comes out the same to the last bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.artifacts import open_store
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.file import load_spec
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.scheduler.submit.need import plan_job

from ..conftest import Cli
from ..models import write_job


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A base model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


TRAINER = """
import os, sys
from pathlib import Path

from tests.warm import client

if Path(os.environ["FIRST"]).exists():
    os.execv(sys.executable, [sys.executable, "-m", "loractl.worker.recipe.trainer"])
Path(os.environ["FIRST"]).touch()
sys.exit(client("tests.warm", []))
"""
"""The first trainer is forked, the others start cold: another process has another hash seed."""


@pytest.fixture
def worker(cli: Cli, tmp_path: Path) -> Iterator[None]:
    """A worker that stays, so that reproduce can compare with what it has."""
    (tmp_path / "first_warm.py").write_text(TRAINER)
    path = f"{tmp_path}:{cli.environment['PYTHONPATH']}"
    own = {"LORACTL_TRAINER": "first_warm", "PYTHONPATH": path, "FIRST": str(tmp_path / "first")}
    process = cli.with_environment(**own).start("worker", warm_start=True)
    yield
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.mark.long
def test_a_job_that_memory_had_changed_is_reproduced_bit_for_bit(
    cli: Cli, home: Path, worker: None, base: Path, tmp_path: Path
) -> None:
    # as after out-of-memory: 2 rows at once for the 4 that the job asks for; and what it asks for has dropout
    extra = "labels: {project: desk}\n"
    job = write_job(tmp_path, base, method="[lora, qlora]", extra=extra)
    (tmp_path / "more.jsonl").write_text((tmp_path / "data.jsonl").read_text().replace("help", "assist"))
    more = "dataset.more=[{path: more.jsonl, share: 0.3, split: 'train[5:]'}]"
    spec = load_spec(job, ["dataset.test_size=0.4", more])
    settings = load_settings(cli.environment)
    uri, digest = open_store(settings).put_dataset(tmp_path / "data.jsonl")
    second = dict(zip(("uri", "sha256"), open_store(settings).put_dataset(tmp_path / "more.jsonl"), strict=True))
    store = Store(connect(settings))
    planned = plan_job(spec, "tester", {"path": {"uri": uri, "sha256": digest}, "more.0": second}, store)
    store.jobs.submit(replace(planned, adjustment=Adjustment(micro_batch=2, accumulation=2)))
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "more.jsonl").unlink()
    cli("status", 1, "--watch", timeout=180)

    dry = cli("reproduce", 1, "--dry-run")
    assert "Job 1 (tiny) again: lora, seed 0, batch 2 x 2." in dry.stdout
    assert "No reason is known for a different result." in dry.stdout
    assert len(json.loads(cli("status", "-a", "--json").stdout)) == 1, "a dry run queues nothing"
    queued = cli("reproduce", 1)
    assert "Job 2 (tiny) is queued, to reproduce job 1." in queued.stdout
    assert "loractl reproduce 1 --check 2" in queued.stderr
    cli("status", 2, "--watch", timeout=180)

    same = cli("reproduce", 1, "--check", 2)
    assert "2 came out the same as 1: the adapters are equal bit for bit" in same.stdout
    found = json.loads(cli("reproduce", 1, "--check", 2, "--json").stdout)
    assert found["same"] and found["ran_with"] == [] and found["parted_at_step"] is None
    assert _adapter(cli, 2, tmp_path) == _adapter(cli, 1, tmp_path)
    shown = json.loads(cli("status", 2, "--json").stdout)
    assert shown["labels"] == {"project": "desk", "reproduces": "1"}
    assert shown["events"][0]["text"] == "queued by tester, to reproduce job 1"
    assert shown["spec"]["method"] == "lora"
    assert not {"auto", None} & {shown["spec"]["training"][key] for key in ("dtype", "optim", "gradient_checkpointing")}
    report = json.loads(cli("report", 2, "--json").stdout)["training"]
    assert (report["per_device_train_batch_size"], report["gradient_accumulation_steps"]) == (2, 2)

    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    changed = json.loads(cli("reproduce", 1, "--dry-run", "--json").stdout)
    assert changed["job_id"] is None
    assert [(each["what"], each["now"]) for each in changed["different"]] == [
        ("base model", "model.safetensors changed")
    ]
    shutil.rmtree(home / "artifacts" / "datasets")
    gone = cli("reproduce", 1, code=1).stderr
    assert f"dataset.path (sha256 {digest[:12]}) can't be fetched from the artifact store" in gone and "Hint:" in gone


def test_what_has_no_result_is_not_reproduced(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    cli("submit", write_job(tmp_path, tiny_model))
    assert "job 1 has no result: it is queued" in cli("reproduce", 1, code=1).stderr
    assert "there is no job 7" in cli("reproduce", 7, code=3).stderr
    assert "--check queues nothing" in cli("reproduce", 1, "--check", 2, "--dry-run", code=2).stderr


def _adapter(cli: Cli, job_id: int, folder: Path) -> bytes:
    target = folder / f"adapter-{job_id}"
    cli("adapters", "pull", job_id, target)
    return (target / "adapter_model.safetensors").read_bytes()
