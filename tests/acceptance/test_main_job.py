"""The main job, end to end, as a person runs it: submit, worker, status, report, adapter.

Once on what one machine has by itself, once on what a lab has; every service is real.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .. import services
from ..conftest import Cli
from ..models import write_job


@pytest.fixture(params=[pytest.param("one machine", marks=pytest.mark.long), "lab"])
def place(request: pytest.FixtureRequest, make_cli: Callable[..., Cli]) -> Cli:
    if request.param == "one machine":
        return make_cli()
    s3: services.S3 = request.getfixturevalue("s3_server")
    database = request.getfixturevalue("upgraded_postgres")
    redis_url = request.getfixturevalue("redis_url")
    cli = make_cli(
        LORACTL_DATABASE_URL=database, LORACTL_REDIS_URL=redis_url, LORACTL_ARTIFACTS_URL=s3.url, **s3.environment
    )
    cli("lab", "adopt-store")
    return cli


def test_a_lora_and_a_qlora_job_go_from_submit_to_report(place: Cli, tiny_model: Path, tmp_path: Path) -> None:
    files = [write_job(tmp_path, tiny_model, name=f"tiny-{method}", method=method) for method in ("lora", "qlora")]

    submitted = place("submit", *files)
    assert "Job 1 (tiny-lora) is queued." in submitted.stdout
    assert "no worker is online" in place("status").stdout
    (tmp_path / "data.jsonl").unlink()  # a worker elsewhere does not have it: the store does
    place("worker", "--drain-when-idle", timeout=240)

    jobs = json.loads(place("status", "-a", "--json").stdout)
    assert [(j["name"], j["status"], j["method"], j["step"]) for j in jobs] == [
        ("tiny-qlora", "succeeded", "qlora", 6),
        ("tiny-lora", "succeeded", "lora", 6),
    ]
    assert "succeeded" in place("status", "-a").stdout
    for job in jobs:
        _the_result_is_complete(place, job, tiny_model, tmp_path)
    compared = json.loads(place("compare", *(j["job_id"] for j in jobs), "--json").stdout)
    assert {j["reading"] for j in compared["jobs"]} == {"best", "too few rows"}, "the same two held-out rows"
    assert compared["differences"].keys() == {"method"}
    assert "SETTING" in place("compare", 1, 2).stdout
    listed = place("adapters").stdout
    assert "tiny-lora" in listed and "tiny-qlora" in listed


def _the_result_is_complete(place: Cli, job: dict, tiny_model: Path, tmp_path: Path) -> None:
    job_id = job["job_id"]
    report = json.loads(place("report", job_id, "--json").stdout)
    metrics = {m["name"]: m for m in report["evaluation"]["metrics"]}
    assert metrics["loss"]["tuned"] < metrics["loss"]["base"]
    assert {"perplexity", "stop_token_loss", "exact_match", "rougeL", "ends_by_itself"} <= set(metrics)
    assert len(report["evaluation"]["answers"]) == 2
    assert report["training"]["peak_memory_bytes"] > 0
    assert report["data"]["train_rows"] + report["data"]["held_out_rows"] == 24
    assert len(report["data"]["sha256"]) == 64
    assert report["method"] == job["method"]
    text = place("report", job_id).stdout
    assert "MEASURE" in text and "95 % INTERVAL" in text

    shown = place("status", job_id, "--full").stdout
    for expected in ("queued by tester", "attempt 1 started on", "saved step 3", "succeeded", "target_modules"):
        assert expected in shown
    assert "loss" in place("logs", job_id).stdout

    folder = tmp_path / f"adapter-{job_id}"
    place("adapters", "pull", job_id, folder)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tuned = PeftModel.from_pretrained(base, folder)
    learned = [p for name, p in tuned.named_parameters() if "lora_B" in name]
    assert learned and any(float(p.detach().abs().sum()) > 0 for p in learned)


def test_submit_wait_follows_the_job_and_returns_its_outcome(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    good = write_job(tmp_path, tiny_model, name="good")
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    bad = write_job(tmp_path, tmp_path / "no-weights", name="bad")
    worker = cli.start("worker", warm_start=True)
    try:
        done = cli("submit", good, "--wait", timeout=180)
        assert "Job 1 succeeded" in done.stdout
        failed = cli("submit", bad, "--wait", code=1, timeout=180)
        assert "model_not_found" in cli("status", 2).stdout
        assert "has no tokenizer" in failed.stdout
    finally:
        worker.terminate()
        assert worker.wait(timeout=60) == 0
