"""What submit prints for scripts: one JSON value with --wait too, and a file of several jobs that is one again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loractl.common.errors import ExitCode
from loractl.common.job.file import load_specs
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.scheduler.status import follow
from loractl.scheduler.submit.command import submit

from ....models import write_helpdesk

JOBS = """
name: first
base_model: org/model
dataset: {path: rows.jsonl}
---
name: second
base_model: org/model
dataset: {path: rows.jsonl}
"""


@pytest.fixture
def two(upgraded_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two jobs, to be submitted by ada to an empty lab."""
    monkeypatch.setenv("LORACTL_HOME", str(upgraded_home))
    monkeypatch.setenv("LORACTL_USER", "ada")
    write_helpdesk(tmp_path / "rows.jsonl")
    (tmp_path / "two.yaml").write_text(JOBS)
    return tmp_path / "two.yaml"


def test_with_json_a_wait_goes_to_stderr_and_the_jobs_are_printed_as_they_ended(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, open_jobs = Store(connect(load_settings())), [2, 1]
    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=lambda _: store.jobs.cancel(open_jobs.pop(), "ada")))
    told = CliRunner().invoke(submit, [str(two), "--wait", "--json"])
    assert told.exit_code == ExitCode.FAILED, told.exception
    assert [(job["job_id"], job["status"]) for job in json.loads(told.stdout)] == [(1, "cancelled"), (2, "cancelled")]
    assert "job 1 queued" in told.stderr and "Job 2 cancelled: " in told.stderr


def test_a_dry_run_of_a_file_of_several_jobs_prints_such_a_file(two: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(submit, [str(two), "--dry-run"])
    assert told.exit_code == 0, told.exception
    (tmp_path / "resolved.yaml").write_text(told.stdout)
    assert load_specs(tmp_path / "resolved.yaml") == load_specs(two)
