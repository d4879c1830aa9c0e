"""Hold and release, as a person does it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..conftest import Cli
from ..models import write_helpdesk

pytestmark = pytest.mark.here


def test_a_job_is_held_with_a_reason_that_others_read_and_released(cli: Cli, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    cli("submit", tmp_path / "job.yaml")
    held = cli("hold", 1, "--reason", "the data\nare wrong")
    assert held.stdout == "Job 1 is held; loractl release 1 lets it start.\n"
    for command in (["status"], ["status", 1], ["status", 1, "--full"], ["why", 1]):
        shown = cli(*command).stdout
        assert re.search(r"held\W+by tester: the data are wrong", shown) and "held, held" not in shown
    refused = cli("retry", 1, code=1).stderr
    assert refused == "Error: job 1 is held, and has not ended\nHint: loractl release 1 lets it start\n"
    assert cli("release", 1).stdout == "Job 1 is released.\n"
    assert "held" not in cli("status").stdout
    refused = cli("release", 1, code=1).stderr
    assert refused == "Error: job 1 is queued: nobody holds it\nHint: loractl status 1 shows its state\n"
    assert "there is no job 9" in cli("hold", 9, code=3).stderr


def test_of_several_jobs_what_can_be_done_is_done_and_what_cannot_is_named(cli: Cli, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    cli("submit", *[tmp_path / "job.yaml"] * 3)
    cli("cancel", 2)
    told = cli("hold", 1, 2, 3, code=1)
    assert told.stderr == "Error: job 2 was cancelled: only a waiting job can be held\n"
    told = cli("cancel", 1, 2, 999, 10**20, 3, code=1)
    assert told.stdout == "Job 1 is cancelled.\nJob 3 is cancelled.\n"
    refused = ["Error: job 2 has already been cancelled", "Error: there is no job 999"]
    assert told.stderr.splitlines() == [*refused, f"Error: there is no job {10**20}"]
    refused = cli("release", 2, code=1).stderr
    assert refused == "Error: job 2 was cancelled: nobody holds it\nHint: loractl retry 2 queues it again\n"
    listed = cli("status", "-a").stdout
    assert "held" not in listed and listed.count("cancelled") >= 3
    told = cli("retry", 999, 1, 3, 1, code=1)
    assert told.stdout == "Job 1 is queued again.\nJob 3 is queued again.\n"
    assert told.stderr == "Error: there is no job 999\n"
    assert cli("retry", 1, code=1).stderr.startswith("Error: job 1 is queued: only a failed")
