"""How many connections to PostgreSQL a process keeps."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import create_engine, text

from loractl.common.store.database import make_engine
from loractl.common.store.store import Store

pytestmark = pytest.mark.both


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_worked_at_one_moment_leaves_as_many_connections_as_are_kept(postgres_url: str, kept: int) -> None:
    engine = make_engine(postgres_url, connections=6, kept=kept)
    all_in, out = threading.Barrier(6), threading.Barrier(6)

    def work() -> None:
        with Store(engine).begin(read_only=True) as tx:
            tx.session.execute(text("SELECT 1"))
            all_in.wait(timeout=20)
            out.wait(timeout=20)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    all_in.wait(timeout=20)
    assert _open(postgres_url) == 5
    out.wait(timeout=20)
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 10
    while (left := _open(postgres_url)) != kept:  # a server process ends a moment after its connection
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    engine.dispose()


def _open(url: str) -> int:
    admin = create_engine(url)
    with admin.connect() as connection:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"
        count: int = connection.execute(text(others)).scalar_one()
    admin.dispose()
    return count
