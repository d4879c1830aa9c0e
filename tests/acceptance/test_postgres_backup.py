"""A lab's database in one file and back: as it was at one moment, whole or not at all, with numbers that go on."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, inspect, text

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.store.database import make_engine
from loractl.common.store.dump import dump, load
from loractl.common.store.records import Claim, Progress
from loractl.common.store.roles import WantedLogin, apply_roles
from loractl.common.store.schema import HEAD, alembic_config, revision, upgrade
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_helpdesk
from ..unit.factories import submission, take


@pytest.fixture
def second(postgres_url: str) -> Iterator[str]:
    """An empty database, as a new server would have it."""
    base, _, query = postgres_url.partition("?")
    name = f"{base.rpartition('/')[2]}_restored"
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield f"{base.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def first(upgraded_postgres: str) -> Iterator[Store]:
    """A lab in which one job runs, one waits and one has ended, with a history that has odd words."""
    engine = make_engine(upgraded_postgres)
    store = Store(engine)
    store.jobs.submit(submission(name="ended"))
    claim = take(store)
    assert isinstance(claim, Claim)
    points = tuple((step, "loss", 1 / step) for step in range(1, 40))
    odd = 'tab\tbackslash \\N quote " newline\nünï✓'
    store.attempts.finish(claim, Reason.BAD_DATA, odd, Progress(log=odd, metrics=points))
    store.jobs.submit(submission(name="runs"))
    assert isinstance(take(store), Claim)
    store.jobs.submit(submission(name="waits", notify=["ops"]))
    yield store
    engine.dispose()


def rows(url: str) -> dict[str, int]:
    """How many rows each table has, whatever loractl calls its own."""
    with opened(url) as engine, engine.connect() as connection:
        names = [name for name in inspect(connection).get_table_names() if name != "alembic_version"]
        return {name: connection.execute(text(f'SELECT count(*) FROM "{name}"')).scalar_one() for name in names}


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    engine = make_engine(url)
    yield engine
    engine.dispose()


def test_a_lab_is_copied_by_a_login_that_only_reads_and_goes_on_in_another_database(
    first: Store, postgres_url: str, second: str, make_cli: Callable[..., Cli], home: Path, tmp_path: Path
) -> None:
    page = apply_roles(first.engine, [WantedLogin(name=f"page_{os.getpid()}", role="loractl_web")]).logins[0]
    assert page.url is not None
    try:
        told = make_cli(LORACTL_DATABASE_URL=page.url)("db", "backup", tmp_path / "lab.backup").stdout
    finally:
        with first.engine.begin() as connection:
            connection.execute(text(f"DROP OWNED BY page_{os.getpid()}; DROP ROLE page_{os.getpid()}"))
    assert " holds 3 jobs, the newest 3, last change 20" in told and f"revision {HEAD}." in told
    assert (tmp_path / "lab.backup").stat().st_mode & 0o777 == 0o600
    lost = first.jobs.submit(submission(name="lost"))
    cli = make_cli(LORACTL_DATABASE_URL=second)
    stored = home / "artifacts" / "jobs" / "9" / "attempt-1"
    stored.mkdir(parents=True)
    (stored / "report.json").write_text("{}")
    done = cli("db", "restore", tmp_path / "lab.backup")
    assert done.stdout.startswith("3 jobs, the newest 3, ") and "loractl db roles" in done.stderr
    assert {**rows(second), "nodes": 0} == {
        **rows(postgres_url),
        "nodes": 0,
        "jobs": 3,
        "events": rows(second)["events"],
        "locks": 2,  # of the fleet and of closing, which `db upgrade` makes; cards' come with their nodes
    }
    with opened(second) as engine:
        assert revision(engine) == HEAD
        back = Store(engine)
        states = [(job.name, job.status) for job in back.jobs.matching()[::-1]]
        assert states == [("ended", Status.FAILED), ("runs", Status.RUNNING), ("waits", Status.QUEUED)]
        assert back.jobs.events(1)[-1].text == first.jobs.events(1)[-1].text and "✓" in back.jobs.get(1).message
        assert [point.value for point in back.jobs.metrics(1, "loss")] == [1 / step for step in range(1, 40)]
        assert back.attempts.reap() and back.jobs.get(2).status is Status.QUEUED, "the worker that it ran on is gone"
        assert back.jobs.submit(submission()) == 10 > lost, "9 has stored something, though no row knows it"
        assert back.jobs.events(10), "the history goes on counting, too"


def test_what_changes_while_it_is_copied_is_in_it_wholly_or_not_at_all(
    first: Store, second: str, tmp_path: Path
) -> None:
    over = threading.Event()

    def submits() -> None:
        while not over.is_set():
            first.jobs.submit(submission())

    thread = threading.Thread(target=submits)
    thread.start()
    try:
        dumped = dump(first.engine, tmp_path / "lab.backup")
    finally:
        over.set()
        thread.join()
    with opened(second) as engine:
        load(engine, tmp_path / "lab.backup", lambda newest: newest)
        back = Store(engine)
        assert len(back.jobs.matching()) == dumped.jobs
        assert all(back.jobs.events(job.job_id) for job in back.jobs.matching()), (
            "each job has its history, each history its job"
        )


def test_a_database_that_is_not_empty_is_refused_and_stays(first: Store, postgres_url: str, tmp_path: Path) -> None:
    dump(first.engine, tmp_path / "lab.backup")
    before = rows(postgres_url)
    with pytest.raises(WrongState) as refused:
        load(first.engine, tmp_path / "lab.backup", lambda newest: newest)
    assert refused.value.sentence.startswith("the database is not empty: there are rows in jobs")
    assert "createdb" in (refused.value.hint or "") and rows(postgres_url) == before


def test_tables_that_are_there_and_empty_are_filled_with_the_roles_triggers_on(
    first: Store, second: str, tmp_path: Path
) -> None:
    dump(first.engine, tmp_path / "lab.backup")
    with opened(second) as engine:
        upgrade(engine)
        apply_roles(engine)
        load(engine, tmp_path / "lab.backup", lambda newest: newest)
        assert [job.user for job in Store(engine).jobs.matching()] == ["ada"] * 3, "not the login that restores"
        with engine.connect() as connection:
            off = text("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'loractl%' AND tgenabled <> 'O'")
            assert connection.execute(off).scalar() == 0


def test_a_dump_of_an_older_revision_is_brought_to_this_one(postgres_url: str, second: str, tmp_path: Path) -> None:
    from alembic import command

    with opened(postgres_url) as engine:
        with engine.begin() as connection, alembic_config(connection) as config:
            command.upgrade(config, "0031")
            connection.execute(text("INSERT INTO uses (\"user\", gib_hours, at) VALUES ('ada', 2.5, now())"))
        assert dump(engine, tmp_path / "old.backup").revision == "0031"
    with opened(second) as engine:
        load(engine, tmp_path / "old.backup", lambda newest: newest)
        assert revision(engine) == HEAD and Store(engine).jobs.users() == ["ada"]
        assert Store(engine).jobs.submit(submission()) == 1


@pytest.mark.parametrize(
    "fault",
    [
        "flipped",
        "newer",
        *(
            pytest.param(fault, marks=pytest.mark.long)
            for fault in ("cut", "text", "too old", "a table less", "a row more")
        ),
    ],
)
def test_what_is_no_whole_dump_is_refused_and_nothing_is_written(
    first: Store, second: str, tmp_path: Path, fault: str
) -> None:
    file = tmp_path / "lab.backup"
    dump(first.engine, file)
    content = bytearray(file.read_bytes())
    if fault == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        with zipfile.ZipFile(file) as archive:
            jobs = archive.getinfo("jobs.copy")
        content[jobs.header_offset + 100] ^= 0xFF  # behind its header: of the rows themselves
        file.write_bytes(content)
    elif fault == "text":
        file.write_text("hello")
    else:
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        told = json.loads(members["contents.json"])
        if fault in ("newer", "too old"):
            told["revision"] = "9999" if fault == "newer" else "0030"
        elif fault == "a table less":
            del members["metrics.copy"]
        else:
            members["metrics.copy"] += members["metrics.copy"].replace(b"\tloss\t", b"\tother\t", 1).splitlines(True)[0]
        members["contents.json"] = json.dumps(told).encode()
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    with opened(second) as engine:
        with pytest.raises((UsageError, LoractlError)) as refused:
            load(engine, file, lambda newest: newest)
        assert refused.value.hint
        assert revision(engine) is None, "not even the tables are there"


def test_upgrade_waits_for_no_worker_that_still_serves_and_makes_a_backup_before(
    postgres_url: str, second: str, make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    from alembic import command

    cli = make_cli(LORACTL_DATABASE_URL=postgres_url)
    with opened(postgres_url) as engine:
        with engine.begin() as connection, alembic_config(connection) as config:
            command.upgrade(config, "0031")
            connection.execute(
                text(
                    "INSERT INTO nodes (node, host, gpu, device_name, kind, total, free, reserved, outside,"
                    " outside_bytes, used, margin, max_jobs, labels, versions, draining, seen_at) VALUES ('heron:0',"
                    " 'heron', 'x', 'x', 'nvml', 1, 1, 0, '[]', 0, '{}', 0, 1, '{}', '{}', false, now())"
                )
            )
        told = cli("db", "upgrade", "--backup", tmp_path / "before.backup", code=1).stderr
        assert "heron still serves with revision 0031" in told and "systemctl stop" in told
        assert not (tmp_path / "before.backup").exists() and revision(engine) == "0031"
        done = cli("db", "upgrade", "--backup", tmp_path / "before.backup", "--force").stdout
        assert "before.backup holds the state before: 0 jobs." in done and revision(engine) == HEAD
        again = cli("db", "upgrade", "--backup", tmp_path / "again.backup")
        assert again.stdout.endswith(f"is already at revision {HEAD}.\n") and not (tmp_path / "again.backup").exists()
        assert "again.backup was not written: nothing changes; loractl db backup " in again.stderr
    with opened(second) as engine:
        load(engine, tmp_path / "before.backup", lambda newest: newest)
        assert revision(engine) == HEAD


def test_no_password_is_in_an_argument_or_in_what_is_said(
    first: Store, postgres_url: str, make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    """Rows are copied by this process: there is no other one whose arguments could be read."""
    write_helpdesk(tmp_path / "data.jsonl")
    cli = make_cli(LORACTL_DATABASE_URL="postgresql://lab:hunter2@127.0.0.1:9/loractl")
    for words in (("backup", tmp_path / "x"), ("restore", tmp_path / "data.jsonl"), ("upgrade",)):
        done = cli("db", *words, code=None)
        assert done.returncode not in (0, None) and "hunter2" not in done.stdout + done.stderr
        assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
