"""Cleaning up after real runs: what goes, what is said, and what is still there to be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Cli
from ..models import write_helpdesk, write_job


@pytest.mark.long
def test_old_results_go_when_asked_and_everything_else_still_works(
    cli: Cli, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path, tiny_model)
    for _ in range(2):
        cli("submit", job, "--set=training.max_steps=3")
    gone = shutil.copytree(tiny_model, tmp_path / "gone")
    cli("submit", write_job(tmp_path, gone, name="bad"))
    (gone / "config.json").unlink()
    cli("worker", "--drain-when-idle", timeout=240)
    log = cli("logs", 2).stdout
    assert len(log.splitlines()) > 3
    lines = "".join(log.splitlines(keepends=True)[-2:])
    assert cli("logs", 2, "--tail", 2).stdout == lines
    assert cli("logs", 2, "--tail", 0).stdout == ""
    (home / "work" / "3" / "attempt-1").mkdir(parents=True)
    (home / "work" / "3" / "attempt-1" / "log.txt").write_text("left by a node that was killed")

    would = json.loads(cli("gc", "--keep-last", 1, "--dry-run", "--json").stdout)
    found = {(g["kind"], g["name"]) for g in would["removed"]}
    assert would["dry_run"] and would["bytes"] > 10_000
    assert ("result", "jobs/1/attempt-1") in found and ("work folder", str(home / "work" / "3")) in found
    assert {kind for kind, _ in found} == {"result", "work folder", "log"}
    assert cli("report", 1).stdout, "nothing was changed"

    done = cli("gc", "--keep-last", 1).stdout
    assert "Freed " in done and "jobs/1/attempt-1  (older than tester's newest of tiny)" in done
    assert not (home / "artifacts" / "jobs" / "1").exists() and not (home / "work" / "3").exists()
    assert cli("gc", "--keep-last", 1).stdout == "Freed nothing: everything that is stored is needed.\n"

    for command in (["report", 1], ["adapters", "pull", 1, tmp_path / "one"]):
        told = cli(*command, code=1).stderr
        assert told.startswith("Error: job 1 no longer has a result: it was removed\nHint: loractl status 1")
    assert "removed by tester (loractl gc)" in cli("status", 1, "--full").stdout
    assert "Its result was removed" in cli("status", 1).stdout
    assert cli("logs", 1).stderr == "The log of job 1 was removed with its result.\n"
    assert "model" in cli("logs", 3).stdout + cli("status", 3).stdout, "why a job failed stays in the database"

    assert cli("report", 2).stdout
    cli("adapters", "pull", 2, tmp_path / "two")
    assert cli("logs", 2).stdout.startswith(log), "now read from the result"
    assert cli("logs", 2, "--tail", 2).stdout.count("\n") == 2


def test_a_store_of_another_database_is_refused(make_cli: Callable[..., Cli], home: Path, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (home / "artifacts" / "jobs" / "7" / "attempt-1").mkdir(parents=True)
    (home / "artifacts" / "jobs" / "7" / "attempt-1" / "report.json").write_text("{}")
    cli = make_cli()
    told = cli("gc", "--dry-run", code=2).stderr
    assert told.startswith("Error: the artifact store has files of jobs that this database does not know: 7\nHint: ")
    assert cli("gc", "--force").stdout.startswith("Freed nothing")
    assert (home / "artifacts" / "jobs" / "7" / "attempt-1" / "report.json").exists()


@pytest.mark.parametrize(("age", "says"), [("1h", "is too short"), ("-3d", "is not a duration"), ("", "is not a")])
def test_an_age_that_would_take_what_is_just_being_submitted_is_refused(cli: Cli, age: str, says: str) -> None:
    assert says in cli("gc", f"--older-than={age}", code=2).stderr


def test_any_age_in_the_calendar_and_beyond_it_will_do(cli: Cli) -> None:
    assert "Freed nothing" in cli("gc", "--older-than", "99999999999d").stdout
