"""What a login can say to the database that means harm, or a psql that somebody forgot."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator, Sequence

from sqlalchemy import Connection

from loractl.common.errors import Forbidden
from loractl.common.store.database import DatabaseError, make_engine

OLD_LOCKS = "SELECT pg_advisory_lock(n) FROM unnest(ARRAY[1092721, 1092722, 1092723, 1092725]) AS n"

HOLDING = (
    "SELECT pg_advisory_lock(1092722)", "SELECT pg_advisory_lock(24297, {0})", OLD_LOCKS,
    "SELECT * FROM jobs FOR UPDATE", "SELECT * FROM nodes FOR KEY SHARE", "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE",
    "LOCK TABLE jobs IN ACCESS SHARE MODE", "LOCK TABLE jobs IN ROW EXCLUSIVE MODE", "TRUNCATE jobs CASCADE",
    "INSERT INTO events (job_id, at, kind, text) VALUES ({0}, now(), 'queued', 'queued by x')",
    "INSERT INTO sweeps (name, \"user\", settings, created_at) VALUES ('x', 'x', '{{}}', now())",
    "INSERT INTO job_labels VALUES ({0}, 'a', 'b')", "UPDATE jobs SET status = 'failed'", "DELETE FROM events",
    "SELECT loractl_change({0}, 'edited', '{{}}', '{{\"yields\": false}}', 'ada', '')",
    "SELECT loractl_change({0}, 'held', '{{}}', '{{\"held\": true}}', 'ada', '')",
    "SELECT loractl_change({0}, 'retry', '{{}}', '{{\"status\": \"queued\"}}', 'ada', '')",
    "SELECT loractl_change({0}, 'cancelled', '{{}}', '{{\"status\": \"cancelled\"}}', 'ada', '')",
    "DECLARE slow CURSOR WITH HOLD FOR SELECT * FROM jobs", "SET CONSTRAINTS ALL IMMEDIATE",
    "SELECT loractl_look({0}, 'f', 'ada', now())", "SELECT loractl_submit('{{}}')",
    "SELECT loractl_tag('tiny', 'prod', {0}, NULL, 'ada')", "SELECT loractl_tag('tiny', 'prod', NULL, {0}, 'ada')",
)  # fmt: skip
"""What takes locks, or is refused them: of a job where one is named."""

STATEMENTS = (
    *HOLDING, "SELECT * FROM jobs, events, nodes",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()",
    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()",
    "SELECT setval('jobs_job_id_seq', 1)", "SELECT nextval('jobs_job_id_seq')", "SET ROLE loractl_worker",
    "SELECT lo_create(0)", "CREATE TEMP TABLE t (a int)", "NOTIFY x", "SELECT loractl_lab.enter('x', NULL)",
)  # fmt: skip
"""All that a login can say."""


@contextlib.contextmanager
def held_open(url: str, *statements: str) -> Iterator[None]:
    """A transaction that has said so much, and stays open."""
    engine = make_engine(url, kept=0)
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        yield
        connection.rollback()
    engine.dispose()


def storm(
    url: str, over: threading.Event, said: list[str], jobs: Sequence[int], statements: Sequence[str], most_s: float
) -> None:
    """Say one after the other until `over`, each in a transaction that then stays open for at most so long. `said`:
    what was let through. `jobs`: the numbers that are named."""
    engine, draws = make_engine(url, kept=0), secrets.SystemRandom()

    def hold(connection: Connection, statement: str) -> None:
        with contextlib.suppress(DatabaseError, Forbidden):
            connection.exec_driver_sql("SET lock_timeout = 200")
            connection.exec_driver_sql(statement)
            said.append(statement)
            over.wait(draws.uniform(0, most_s))
        connection.rollback()

    while not over.wait(0.01):
        with contextlib.suppress(DatabaseError, Forbidden), engine.connect() as connection:
            hold(connection, draws.choice(statements).format(draws.choice(jobs)))
    engine.dispose()
