"""Jobs after jobs on real rows: answers, preferences that begin from them, and a third; then the result leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import Cli
from ..hub_writes import TOKEN, WritableHub

ROWS = Path(__file__).parents[2] / "examples" / "data"

CHAIN = """
name: answers
base_model: {base}
method: lora
dataset: {{path: {rows}/support.jsonl, max_length: 512, on_overflow: drop}}
lora: {{r: 4}}
training: {{max_steps: 2, per_device_train_batch_size: 2}}
evaluation: {{samples: 1, max_rows: 4, max_new_tokens: 2}}
---
name: preferences
base_model: {base}
method: lora
task_type: preference
dataset: {{path: {rows}/support-pairs.jsonl, max_length: 512, on_overflow: drop}}
lora: {{r: 4, init_from: {{job: answers}}}}
training: {{max_steps: 2, per_device_train_batch_size: 2}}
evaluation: {{samples: 1, max_rows: 4, max_new_tokens: 2}}
resources: {{time_limit: 1s}}
max_retries: 0
---
name: more-answers
base_model: {base}
method: lora
after: [answers]
dataset: {{path: {rows}/support.jsonl, max_length: 512, on_overflow: drop}}
lora: {{r: 4, init_from: {{job: preferences}}}}
training: {{max_steps: 2, per_device_train_batch_size: 2}}
evaluation: {{samples: 1, max_rows: 4, max_new_tokens: 2}}
"""


@pytest.mark.long
def test_a_chain_waits_for_a_retry_of_its_middle_and_is_pushed(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(CHAIN.format(base=tiny_model, rows=ROWS))
    queued = cli("submit", tmp_path / "chain.yaml").stdout
    assert "Job 2 (preferences) is queued; it starts after job 1." in queued
    cli("worker", "--drain-when-idle", timeout=300)
    jobs = {job["job_id"]: job for job in json.loads(cli("status", "-a", "--json").stdout)}
    assert [jobs[number]["status"] for number in (1, 2, 3)] == ["succeeded", "failed", "queued"]
    assert (jobs[2]["reason"], jobs[3]["awaits"]) == ("timed_out", 2)
    why = json.loads(cli("why", "3", "--json").stdout)
    assert why["sentence"] == "job 2 (preferences), which has failed: it starts once a retry of that job succeeds"

    cli("retry", "2", "--set", "resources.time_limit=1h")
    cli("worker", "--drain-when-idle", timeout=300)
    shown = [json.loads(cli("show", number, "--json").stdout) for number in (1, 2, 3)]
    assert [job["status"] for job in shown] == ["succeeded"] * 3
    assert [job["spec"]["lora"]["init_from"] for job in shown] == [None, "1", "2"]
    assert [(job["after"], job["awaits"]) for job in shown] == [([], None), ([1], None), ([1, 2], None)]
    assert shown[1]["started_at"] > shown[0]["ended_at"] and shown[2]["started_at"] > shown[1]["ended_at"]
    lineage = json.loads(cli("adapters", "show", "3", "--json").stdout)
    assert lineage["init_from"] == 2

    hub = WritableHub(tmp_path / "hub")
    with hub.serving() as url:
        environment = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        out = cli.with_environment(HF_HOME=str(tmp_path / "hf"), **environment)
        out("adapters", "push", "3", "lab/support", "--base-name", "org/tiny")
    _, folder = hub.find("models", "lab/support", "main")
    assert (folder / "README.md").read_text().splitlines()[1] == "base_model: org/tiny"
