"""The schema: migrations and models agree, upgrades are safe, and a database that is away is named."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from loractl.common.errors import ExitCode, LoractlError, SchemaMismatch, ServiceUnreachable, UsageError, WrongState
from loractl.common.settings import Settings, load_settings
from loractl.common.store.database import DatabaseError, connect, make_engine, outage, reachable, told_by
from loractl.common.store.schema import HEAD, alembic_config, migrating, revision, upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Base, conditioned

from ....services import free_port
from ...factories import node_state, submission

pytestmark = pytest.mark.both


def settings_for(url: str, home: Path) -> Settings:
    return dataclasses.replace(load_settings({"LORACTL_HOME": str(home)}), database_url=url)


def set_revision(engine: Engine, found: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :found"), {"found": found})


def test_the_head_that_the_code_names_is_the_newest_migration() -> None:
    with alembic_config(None) as config:
        assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_the_migrations_make_exactly_the_tables_of_the_models(upgraded_url: str) -> None:
    engine = make_engine(upgraded_url)
    with engine.connect() as connection:
        # Types are compared too. What Alembic does not compare on SQLite (a partial index's condition, AUTOINCREMENT)
        # is read from the catalogue below.
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, conditioned(engine.dialect.name)) == []
    engine.dispose()


def test_an_index_of_waiting_jobs_has_no_others(upgraded_url: str) -> None:
    engine = make_engine(upgraded_url)
    indexes = {index["name"]: index for index in inspect(engine).get_indexes("jobs")}
    assert "'queued'" in str(indexes["ix_jobs_order"]["dialect_options"][f"{engine.dialect.name}_where"])
    first = {name: index["column_names"][0] for name, index in indexes.items() if name is not None}
    is_sqlite = engine.dialect.name == "sqlite"  # PostgreSQL before 18 would walk through an index behind the status
    assert first["ix_jobs_line"] == ("status" if is_sqlite else "user")
    engine.dispose()


def test_a_job_number_is_never_given_twice(upgraded_url: str) -> None:
    engine = make_engine(upgraded_url)
    row = (
        'INSERT INTO jobs (name, "user", labels, spec, base_model, data, priority, vram_class, '
        "queue_key, status, held, attempt, retries_used, submitted_at) VALUES ('a', 'b', '{}', '{}', 'd', "
        "'{}', 0, 8, '10000|00000000000000000.lq.?.?||b', 'queued', false, 0, 0, '2026-01-01 00:00:00') "
        "RETURNING job_id"
    )
    with engine.begin() as connection:
        first = connection.execute(text(row)).scalar_one()
        connection.execute(text("DELETE FROM jobs"))
        assert connection.execute(text(row)).scalar_one() > first
    engine.dispose()


def test_an_upgrade_says_from_where_to_where_and_a_second_one_changes_nothing(database_url: str) -> None:
    engine = make_engine(database_url)
    assert revision(engine) is None
    assert upgrade(engine) == (None, HEAD)
    tables = set(inspect(engine).get_table_names())
    assert upgrade(engine) == (HEAD, HEAD)
    assert revision(engine) == HEAD
    assert set(inspect(engine).get_table_names()) == tables == {*Base.metadata.tables, "alembic_version"}
    engine.dispose()


def test_a_downgrade_removes_every_table_again(upgraded_url: str) -> None:
    from alembic import command

    engine = make_engine(upgraded_url)
    with engine.begin() as connection, alembic_config(connection) as config:
        command.downgrade(config, "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    assert revision(engine) is None
    assert upgrade(engine) == (None, HEAD)
    engine.dispose()


def test_an_upgraded_lab_stays_open_until_its_owner_closes_it_and_a_new_one_is_closed(database_url: str) -> None:
    from alembic import command

    engine = make_engine(database_url)
    upgrade(engine)
    store = Store(engine)
    assert store.lab.setting("changes") is None
    job_id = store.jobs.submit(submission())
    with engine.begin() as connection, alembic_config(connection) as config:
        command.downgrade(config, "0037")
    assert upgrade(engine) == ("0037", HEAD)
    assert store.lab.setting("changes") == "open"
    store.jobs.hold(job_id, "bob")
    assert store.jobs.get(job_id).message == "held by bob"
    engine.dispose()


def test_a_downgrade_gives_each_job_the_retries_of_its_spec(upgraded_url: str) -> None:
    from alembic import command

    engine = make_engine(upgraded_url)
    store = Store(engine)
    job_id = store.jobs.submit(submission(max_retries=5))
    with engine.begin() as connection, alembic_config(connection) as config:
        command.downgrade(config, "0050")
        assert connection.execute(text("SELECT max_retries FROM jobs")).scalar() == 5
    assert upgrade(engine) == ("0050", HEAD)
    assert store.jobs.get(job_id).spec["max_retries"] == 5
    engine.dispose()


FOUR_UPGRADES = """
import os, sys
import alembic.command
from loractl.common.store.database import make_engine
from loractl.common.store.schema import upgrade

forked = []
for _ in range(4):
    if not (child := os.fork()):
        upgrade(make_engine(sys.argv[1]))
        os._exit(0)
    forked.append(child)
print([os.waitpid(child, 0)[1] for child in forked])
"""


def test_four_upgrades_at_once_leave_one_schema_and_no_error(database_url: str) -> None:
    """Four processes, as four commands on a new home are: Alembic itself is not made for threads. They are forked from
    one that has imported it, so that they begin within milliseconds of each other."""
    command = [sys.executable, "-c", FOUR_UPGRADES, database_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.stdout, done.returncode) == ("", "[0, 0, 0, 0]\n", 0)
    engine = make_engine(database_url)
    assert revision(engine) == HEAD
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1
    engine.dispose()


def test_a_database_that_is_newer_than_the_code_is_left_alone(upgraded_url: str, tmp_path: Path) -> None:
    engine = make_engine(upgraded_url)
    set_revision(engine, "9999")
    with pytest.raises(SchemaMismatch, match=f"is at revision 9999, this loractl needs revision {HEAD}") as caught:
        upgrade(engine)
    assert caught.value.hint is not None
    assert "upgrade loractl on this machine" in caught.value.hint
    with pytest.raises(SchemaMismatch):
        connect(settings_for(upgraded_url, tmp_path))
    assert revision(engine) == "9999"
    engine.dispose()


def test_a_database_too_old_to_be_upgraded_is_left_alone_and_the_loractl_that_upgrades_it_is_named(
    upgraded_url: str, tmp_path: Path
) -> None:
    engine = make_engine(upgraded_url)
    set_revision(engine, "0030")
    sentence = "the database is at revision 0030, and this loractl upgrades from revision 0031 on"
    for use in (upgrade, lambda _: connect(settings_for(upgraded_url, tmp_path))):
        with pytest.raises(SchemaMismatch) as caught:
            use(engine)
        assert caught.value.sentence == sentence
        hint = "first run loractl db upgrade of loractl 0.5.0, commit 18a2d29e, then this one's"
        assert caught.value.hint == hint
    assert revision(engine) == "0030"
    engine.dispose()


def test_the_embedded_database_is_made_on_the_way_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    settings = load_settings({"LORACTL_HOME": str(tmp_path / "a home")})
    engine = connect(settings)
    assert revision(engine) == HEAD
    assert (tmp_path / "a home").stat().st_mode & 0o777 == 0o700
    with engine.connect() as connection:
        pragmas = [connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "foreign_keys")]
    assert pragmas == ["wal", 1]
    engine.dispose()


def test_no_command_upgrades_the_embedded_database_beneath_a_worker_that_serves_it(upgraded_home: Path) -> None:
    from alembic import command

    settings = load_settings({"LORACTL_HOME": str(upgraded_home)})
    engine = make_engine(settings.database_url)
    store = Store(engine)
    store.cards.see(node_state("heron:0"))
    with migrating(engine) as connection, alembic_config(connection) as config:
        command.downgrade(config, "0050")
    with pytest.raises(WrongState, match="heron still serves with revision 0050") as refused:
        connect(settings)
    assert refused.value.hint is not None and "systemctl stop loractl-worker" in refused.value.hint
    assert revision(engine) == "0050"
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM nodes"))  # as a worker does that ends
    connect(settings).dispose()
    assert revision(engine) == HEAD
    engine.dispose()


def test_a_shared_database_without_tables_is_not_upgraded_by_chance(postgres_url: str, tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatch, match="has no loractl tables yet") as caught:
        connect(settings_for(postgres_url, tmp_path))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("run loractl db upgrade")


@pytest.mark.timeout(30)
def test_a_database_where_nothing_listens_is_named_without_its_password(tmp_path: Path) -> None:
    port = free_port()
    settings = settings_for(f"postgresql+psycopg://lab:hunter2@127.0.0.1:{port}/loractl", tmp_path)
    with pytest.raises(ServiceUnreachable) as caught:
        connect(settings)
    error = caught.value
    assert error.exit_code == ExitCode.UNREACHABLE
    assert f"the database is unreachable at postgresql+psycopg://lab:***@127.0.0.1:{port}/loractl" in error.sentence
    assert "refused" in error.sentence
    assert "\n" not in error.sentence
    assert "hunter2" not in f"{error.sentence}{error.hint}"
    assert error.hint == "check that it runs, or set LORACTL_DATABASE_URL"


def test_a_database_that_cannot_be_opened_is_named_as_unreachable(tmp_path: Path) -> None:
    (tmp_path / "loractl.db").mkdir()
    with pytest.raises(ServiceUnreachable, match="unable to open database file"):
        connect(load_settings({"LORACTL_HOME": str(tmp_path)}))


def test_a_wrong_statement_is_not_taken_for_an_outage(postgres_url: str, tmp_path: Path) -> None:
    from sqlalchemy.exc import ProgrammingError

    engine = make_engine(postgres_url)
    with (
        pytest.raises(ProgrammingError),
        reachable(settings_for(postgres_url, tmp_path)),
        engine.connect() as connection,
    ):
        connection.execute(text("SELECT * FROM nowhere"))
    engine.dispose()


def test_an_address_that_sqlalchemy_can_not_take_shows_the_right_form() -> None:
    with pytest.raises(UsageError, match="LORACTL_DATABASE_URL is not a database URL") as caught:
        make_engine("postgresql+psycopg://lab:hunter2@/x?host=a:1&host=b:2&port=5432")
    assert "hunter2" not in caught.value.sentence
    assert "like postgresql://user@host/loractl" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("state", "passes"),
    [
        ("25006", True), ("XX000", True), ("40001", True), ("40P01", True), ("53100", True), ("53300", True),
        ("55P03", True), ("57014", True), ("57P01", True), ("22001", False), ("23514", False), ("42883", False),
        ("54000", False), ("0A000", False),
    ],
)  # fmt: skip
def test_what_the_server_s_state_causes_is_an_outage_and_what_a_statement_causes_is_none(
    postgres_url: str, state: str, passes: bool
) -> None:
    engine = make_engine(postgres_url)
    with pytest.raises(DatabaseError) as raised, engine.connect() as connection:
        connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{state}'; END $$"))
    assert outage(raised.value) == ("so it is" if passes else None)
    assert told_by(raised.value) == "so it is"
    engine.dispose()


def test_a_connection_to_a_server_that_only_reads_is_given_up(postgres_url: str) -> None:
    """After a failover the old primary still answers on connections of before: only a new one finds the new primary."""
    engine = make_engine(postgres_url)
    with engine.connect() as connection:
        before = connection.execute(text("SELECT pg_backend_pid()")).scalar()
    with pytest.raises(DatabaseError, match="read-only transaction") as raised, engine.begin() as connection:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        connection.execute(text("CREATE TABLE a (b int)"))
    assert outage(raised.value) == "cannot execute CREATE TABLE in a read-only transaction"
    with engine.connect() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar() != before
    engine.dispose()


def test_a_server_that_only_reads_is_told_from_one_that_writes(upgraded_url: str) -> None:
    engine = make_engine(upgraded_url)
    assert Store(engine).takes_writes()
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text(f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = on"))
        engine.dispose()
        assert not Store(engine).takes_writes(), "so that a node which can't write its row is not called stuck"
    engine.dispose()


def test_a_file_that_can_only_be_read_is_no_database_that_went_away(sqlite_template: Path, tmp_path: Path) -> None:
    settings = settings_for(f"sqlite:///{tmp_path / 'loractl.db'}", tmp_path)
    engine = make_engine(f"sqlite:///{sqlite_template}", read_only=True)
    refused = pytest.raises(LoractlError, match="the database can't be written to: sqlite")
    with refused as told, reachable(settings), engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))
    engine.dispose()
    assert (told.value.exit_code, told.value.hint) == (ExitCode.FAILED, "its folder must be one that you may write")


def test_a_full_disk_on_which_sqlite_can_t_make_its_companions_is_no_database_that_went_away(
    sqlite_template: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        shutil.copy(sqlite_template, disk / "loractl.db")
        settings = settings_for(f"sqlite:///{disk / 'loractl.db'}", tmp_path)
        with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as fill:
            while True:
                fill.write(b"0" * 4096)
        with pytest.raises(LoractlError, match="the disk of the database is full: sqlite") as full:
            connect(settings)
        assert (full.value.exit_code, full.value.hint) == (ExitCode.FAILED, "free space there; nothing is lost")
        (disk / "fill").unlink()
        connect(settings).dispose()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
