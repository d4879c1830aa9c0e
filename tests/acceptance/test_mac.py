"""The light client where /proc, the embedded Valkey and what only Linux's Python has are missing, as on macOS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .. import services, webs
from ..conftest import ROOT
from ..databases import UPGRADED, database
from ..models import write_helpdesk

HERE = {"PATH": "/usr/bin:/bin", "LORACTL_USER": "tester", "PYTHONPATH": str(ROOT)}


def on_a_mac(home: Path, *commands: list[str], **environment: str) -> list[dict[str, Any]]:
    """What each command answers, all in one process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "as_mac.py"), json.dumps(commands)],
        env={**HERE, "LORACTL_HOME": str(home / "home"), **environment}, cwd=home, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.long
@pytest.mark.cold
def test_a_person_s_commands_need_nothing_of_linux(postgres_server: str, tmp_path: Path) -> None:
    with database(postgres_server, UPGRADED) as url, services.valkey(tmp_path, "secret") as queue:
        lab = webs.seed(url, tmp_path / "artifacts")
        done = next(row for row in lab.store.adapters.all() if row.name == "triage-r32")
        write_helpdesk(tmp_path / "data.jsonl")
        (tmp_path / "job.yaml").write_text("name: mac\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
        answers = on_a_mac(
            tmp_path, ["submit", "job.yaml"], ["status"], ["status", "--json"], ["why", "mac"],
            ["report", str(done.job_id)], ["adapters"], ["adapters", "pull", str(done.job_id), "pulled"],
            ["logs", str(done.job_id)], ["status", "mac", "--full"], ["gpus"],
            ["web", "--port", "0"], ["cancel", "mac"],
            LORACTL_DATABASE_URL=url, LORACTL_REDIS_URL=queue,
            LORACTL_ARTIFACTS_URL=(tmp_path / "artifacts").as_uri(),
        )  # fmt: skip
    assert [answer["said"] for answer in answers if answer["code"]] == []
    submitted, listed, web = answers[0]["said"], answers[1]["said"], answers[10]["page"]
    assert "(mac) is queued" in submitted and "Warning: the queue" not in submitted
    assert "mac" in listed and "mac" in web
    assert (tmp_path / "pulled" / "adapter_config.json").exists()


@pytest.mark.cold
def test_what_can_t_work_there_says_so_in_a_sentence(tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: mac\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    queued, worker = on_a_mac(tmp_path, ["submit", "job.yaml"], ["worker"])
    assert queued["code"] == 0, "the embedded queue is a worker's"
    assert worker["code"] == 1 and worker["said"].startswith("Error: loractl worker needs Linux, and this is darwin\n")
