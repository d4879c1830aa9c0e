"""The embedded database copied while jobs run, lost, and put back."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Cli
from ..models import write_helpdesk, write_job
from ..waiting import until_job


def job_file(folder: Path) -> Path:
    """One that no worker has to run."""
    write_helpdesk(folder / "data.jsonl")
    (folder / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    return folder / "job.yaml"


def numbers(cli: Cli) -> list[int]:
    return [job["job_id"] for job in json.loads(cli("status", "-a", "--json").stdout)][::-1]


def test_a_home_that_was_lost_in_mid_run_is_restored_and_all_its_jobs_end_well(
    make_cli: Callable[..., Cli], home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """With a trainer that only sleeps: of a training it asks no more than its rows and its files."""
    cli = make_cli(LORACTL_TRAINER="tests.quick_trainer", QUICK_STARTS=str(tmp_path / "starts"))
    for name, steps in (("first", 240), ("second", 10)):
        job = write_job(tmp_path, tiny_model, name=name)
        cli("submit", job, f"--set=training.max_steps={steps}", "--set=training.save_steps=20")
    worker = cli.start("worker", warm_start=True)
    try:
        until_job(cli, 1, lambda job: (job.step or 0) >= 2)
        assert "holds 2 jobs, the newest 2, last change 20" in cli("db", "backup", tmp_path / "backup.db").stdout
        assert "a worker serves this home" in cli("db", "restore", tmp_path / "backup.db", "--force", code=1).stderr
        assert json.loads(cli("status", 1, "--json").stdout)["status"] == "running", "the copy disturbed nobody"
        shutil.copytree(home / "artifacts", tmp_path / "artifacts")
    finally:
        worker.terminate()
        worker.wait(timeout=120)
    cli("db", "stop")
    shutil.rmtree(home)

    home.mkdir()
    shutil.copytree(tmp_path / "artifacts", home / "artifacts")
    assert "are restored" in cli("db", "restore", tmp_path / "backup.db").stdout
    cli("worker", "--drain-when-idle", timeout=240)
    jobs = json.loads(cli("status", "-a", "--json").stdout)
    assert {(job["job_id"], job["status"]) for job in jobs} == {(1, "succeeded"), (2, "succeeded")}
    first = json.loads(cli("status", 1, "--json").stdout)
    assert [a["reason"] for a in first["attempts"]] == ["worker_lost", "ok"]


def test_what_changed_since_the_backup_is_given_up_only_by_force_and_no_number_is_given_twice(
    cli: Cli, tmp_path: Path
) -> None:
    job, backup = job_file(tmp_path), tmp_path / "backup.db"
    cli("submit", job)
    cli("db", "backup", backup)
    assert cli("db", "restore", backup).stdout.startswith("1 job, the newest 1, "), "nothing has changed"
    cli("submit", job)
    cli("cancel", 1)
    told = cli("db", "restore", backup, code=1).stderr
    assert told.startswith("Error: 2 jobs have changed here since backup.db was made\nHint: loractl db backup NEW")
    assert numbers(cli) == [1, 2]
    cli("db", "restore", backup, "--force")
    assert [json.loads(cli("status", n, "--json").stdout)["status"] for n in numbers(cli)] == ["queued"]
    cli("submit", job)
    assert numbers(cli) == [1, 3], "somebody may still speak of job 2"


def test_numbers_of_jobs_that_only_the_artifact_store_remembers_are_not_given_again(
    cli: Cli, home: Path, tmp_path: Path
) -> None:
    job = job_file(tmp_path)
    cli("submit", job)
    cli("db", "backup", tmp_path / "backup.db")
    (home / "artifacts" / "jobs" / "8" / "attempt-1").mkdir(parents=True)
    (home / "artifacts" / "jobs" / "8" / "attempt-1" / "report.json").write_text("{}")
    for file in home.glob("loractl.db*"):
        file.unlink()
    cli("db", "restore", tmp_path / "backup.db")
    cli("submit", job)
    assert numbers(cli) == [1, 9]


@pytest.mark.fresh
def test_a_backup_is_one_private_file_and_replaces_none(cli: Cli, home: Path, tmp_path: Path) -> None:
    told = cli("db", "backup", tmp_path / "b.db", code=2).stderr
    assert told.startswith(f"Error: there is no database at {home}/loractl.db")
    cli("submit", job_file(tmp_path))
    cli("db", "backup", tmp_path / "b.db")
    assert [p.name for p in tmp_path.glob("b.db*")] == ["b.db"]
    assert (tmp_path / "b.db").stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "b.db").read_bytes()
    assert "exists already" in cli("db", "backup", tmp_path / "b.db", code=2).stderr
    assert (tmp_path / "b.db").read_bytes() == before
    told = cli("db", "backup", tmp_path / "none" / "b.db", code=1).stderr
    assert "can't be copied to" in told and "No such file or directory" in told


@pytest.mark.parametrize(
    "kind",
    [
        "torn",
        "newer",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("absent", "text", "other database", "too old")),
    ],
)
def test_what_is_no_backup_is_refused_and_the_database_stays(cli: Cli, tmp_path: Path, kind: str) -> None:
    cli("submit", job_file(tmp_path))
    file = tmp_path / "b.db"
    if kind == "text":
        file.write_text("hello")
    elif kind == "other database":
        sqlite3.connect(file).execute("CREATE TABLE t (a)").connection.close()
    elif kind in ("torn", "newer", "too old"):
        cli("db", "backup", file)
        if kind == "torn":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            database = sqlite3.connect(file)
            found = "9999" if kind == "newer" else "0030"
            database.execute("UPDATE alembic_version SET version_num = ?", [found])
            database.commit()
            database.close()
    says = {
        "absent": "no such file",
        "newer": "the backup is at revision 9999",
        "too old": "the backup is at revision 0030, and this loractl upgrades from revision 0031 on",
    }.get(kind, "is not a loractl backup, or is damaged")
    told = cli("db", "restore", file, "--force", code=1 if kind in ("newer", "too old") else 2).stderr
    assert says in told
    assert numbers(cli) == [1]


def test_a_full_disk_ends_a_backup_with_a_sentence_and_leaves_no_half_file(cli: Cli, tmp_path: Path) -> None:
    cli("submit", job_file(tmp_path))
    disk = tmp_path / "full"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        told = cli("db", "backup", disk / "b.db", code=1).stderr
        assert told.startswith("Error: ") and "can't be copied to" in told
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_a_number_that_comes_twice_costs_neither_result(cli: Cli, home: Path, tiny_model: Path, tmp_path: Path) -> None:
    from loractl.common.artifacts import WEIGHTS, ArtifactStore, attempt_prefix

    lost = tmp_path / "lost" / WEIGHTS
    lost.parent.mkdir(parents=True)
    lost.write_bytes(b"of a job that no row knows any more")
    ArtifactStore((home / "artifacts").as_uri()).put_result(tmp_path / "lost", attempt_prefix(1, 1))
    cli("submit", write_job(tmp_path, tiny_model), "--set=training.max_steps=4")
    cli("worker", "--drain-when-idle", timeout=240)
    shown = json.loads(cli("status", 1, "--json").stdout)
    assert [attempt["reason"] for attempt in shown["attempts"]] == ["store_failed", "ok"]
    assert any("its result is taken over" in event["text"] for event in shown["events"]), "it was trained once"
    assert (home / "artifacts" / attempt_prefix(1, 1) / WEIGHTS).read_bytes() == lost.read_bytes()
    assert (home / "artifacts" / attempt_prefix(1, 2) / WEIGHTS).stat().st_size > 1000


def test_where_the_store_can_not_be_asked_numbers_are_left_out_and_that_is_said(
    cli: Cli, home: Path, tmp_path: Path
) -> None:
    job = job_file(tmp_path)
    cli("submit", job)
    cli("db", "backup", tmp_path / "b.db")
    (home / "artifacts").rename(home / "elsewhere")
    told = cli("db", "restore", tmp_path / "b.db").stderr
    assert "the artifact store is empty: job numbers skip 1000" in told
    (home / "elsewhere").rename(home / "artifacts")
    cli("submit", job)
    assert numbers(cli) == [1, 1002]


def test_a_backup_is_restored_into_its_own_kind_of_database(
    make_cli: Callable[..., Cli], cli: Cli, tmp_path: Path
) -> None:
    cli("submit", job_file(tmp_path))
    cli("db", "backup", tmp_path / "b.db")
    lab = make_cli(LORACTL_DATABASE_URL="postgresql://lab:hunter2@127.0.0.1:9/loractl")
    told = lab("db", "restore", tmp_path / "b.db", code=2).stderr
    assert "is a backup of the embedded database, and this one is PostgreSQL's" in told and "hunter2" not in told
    told = lab("db", "backup", tmp_path / "lab.backup", code=4).stderr
    assert "is unreachable at" in told and "hunter2" not in told
    assert not (tmp_path / "lab.backup").exists() and not (tmp_path / "lab.backup.part").exists()
