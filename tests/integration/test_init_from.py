"""lora.init_from: a training that begins where a stored adapter ended, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Cli
from ..models import write_job

SMALL_STEPS = ("--set=training.max_steps=2", "--set=training.learning_rate=1e-7", "--set=lora.lora_dropout=0")


def test_a_job_begins_from_a_stored_adapter_and_says_so(cli: Cli, home: Path, tiny_model: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_model)
    text = job.read_text().replace("data.jsonl", "data.jsonl, test_size: 0.25")
    job.write_text(text.replace("max_steps: 6", "max_steps: 20, dtype: float32"))
    cli("submit", job)
    cli("worker", "--drain-when-idle")
    begun = (job, "--set=name=further", "--set=lora.init_from=tiny:latest")
    cli("submit", *begun, *SMALL_STEPS)
    assert json.loads(cli("status", 2, "--json").stdout)["spec"]["lora"]["init_from"] == "1", "a tag would move"
    _refuses_what_does_not_fit(cli, begun)
    assert "job 2 is to begin from the adapter of job 1" in cli("adapters", "delete", "tiny", "--yes", code=1).stderr
    cli("worker", "--drain-when-idle")

    first, second = (json.loads(cli("report", n, "--json").stdout) for n in (1, 2))
    assert _loss(second)["tuned"] == pytest.approx(_loss(first)["tuned"], abs=1e-3), "where the first one ended"
    assert _loss(first)["base"] - _loss(first)["tuned"] > 0.5
    lineage = {"job_id": 1, "name": "tiny", "sha256": first["adapter"]["sha256"]}
    assert second["adapter"]["init_from"] == lineage and first["adapter"]["init_from"] is None
    stored = home / "artifacts" / "jobs" / "2" / "attempt-1"
    assert json.loads((stored / "job.json").read_text())["init_from"] == lineage
    assert json.loads((stored / "adapter" / "lineage.json").read_text()) == {"init_from": lineage}
    assert (
        f"begun from the adapter of tiny (job 1), sha256 {lineage['sha256']}"
        in (stored / "adapter" / "README.md").read_text()
    )
    assert "begins from the adapter of tiny (job 1)" in cli("status", 2, "--full").stdout
    assert [row["init_from"] for row in json.loads(cli("adapters", "--json").stdout)] == [None, 1]
    assert "FROM" in cli("adapters").stdout
    assert "begun     from the adapter of tiny (job 1)" in cli("adapters", "show", "further").stdout
    cli("adapters", "delete", "tiny", "--yes")
    assert "loractl adapters lists them" in cli("submit", *begun, code=2).stderr


def _loss(report: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = next(m for m in report["evaluation"]["metrics"] if m["name"] == "loss")
    return found


def _refuses_what_does_not_fit(cli: Cli, begun: tuple[Any, ...]) -> None:
    for override, difference in (
        ("lora.r=8", "lora.r is 8, and that adapter's 4"),
        ("lora.target_modules=[q_proj]", 'lora.target_modules is ["q_proj"], and that adapter\'s all-linear'),
        ("lora.use_dora=true", "lora.use_dora is true, and that adapter's false"),
    ):
        refused = cli("submit", *begun, f"--set={override}", code=2).stderr
        assert f"further can't begin from tiny (job 1): {difference}" in refused
    both = cli("submit", *begun, "--set=lora.init_lora_weights=gaussian", code=2).stderr
    assert "lora.init_from already says how A and B start" in both
    unknown = cli("submit", begun[0], "--set=lora.init_from=nobody", code=2).stderr
    assert "lora.init_from: no adapter nobody:latest is stored" in unknown
    assert json.loads(cli("status", "--json").stdout)[0]["job_id"] == 2, "nothing else was queued"
