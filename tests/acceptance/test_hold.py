"""Hold and release, as a person does it."""

from __future__ import annotations

from pathlib import Path

from ..conftest import Cli
from ..models import write_helpdesk


def test_a_job_is_held_with_a_reason_that_others_read_and_released_by_retry(cli: Cli, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    cli("submit", tmp_path / "job.yaml")
    held = cli("hold", 1, "--reason", "the data\nare wrong")
    assert held.stdout == "Job 1 is held; loractl retry 1 releases it.\n"
    for shown in (cli("status").stdout, cli("status", 1).stdout, cli("show", 1).stdout, cli("why", 1).stdout):
        assert "held by tester: the data are wrong" in shown
    assert "is queued again" in cli("retry", 1).stdout
    assert "held" not in cli("status").stdout
    assert "there is no job 9" in cli("hold", 9, code=3).stderr
