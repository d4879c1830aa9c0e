"""What goes on in a thread of its own for as long as a fault lasts: logins that hold things."""

from __future__ import annotations

import contextlib
import sqlite3
import threading

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from ..hostile import HOLDING, held_open, storm
from .lab import HOSTILE, Lab

THREADS = 6


def hold_locks(lab: Lab, said: list[str], over: threading.Event) -> None:
    """A login that may submit takes all locks that it can get, and keeps each for up to two leases."""
    jobs: list[int] = []
    with contextlib.suppress(DBAPIError), lab.engine.connect() as connection:  # it may be away just now
        jobs += connection.scalars(text("SELECT job_id FROM jobs WHERE status IN ('queued', 'running')"))
    work = lab.hostile, over, said, jobs or [1], HOLDING, 2 * lab.lease_s
    threads = [threading.Thread(target=storm, args=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def hold_row(lab: Lab, job_id: int, over: threading.Event) -> None:
    """The owner's psql that somebody forgot."""
    row = f"SELECT * FROM jobs WHERE job_id = {job_id} FOR UPDATE"
    with contextlib.suppress(DBAPIError), held_open(lab.postgres.url, row):  # a crash ends it, too
        over.wait()


def hold_write_lock(lab: Lab, over: threading.Event) -> None:
    """The sqlite3 that somebody forgot in a transaction."""
    file = lab.database.url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(file, timeout=0.2, isolation_level=None)) as connection:
        while not over.wait(0.01):
            with contextlib.suppress(sqlite3.OperationalError):  # another one writes
                connection.execute("BEGIN IMMEDIATE")
                over.wait()


def use_up_connections(lab: Lab, over: threading.Event) -> None:
    """A login takes all connections that the server gives, after the boxes' own were ended."""
    import psycopg

    url = lab.hostile.replace("+psycopg", "")
    ended = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename NOT IN (current_user, :hostile)")
    with contextlib.ExitStack() as held:

        def take() -> None:
            with contextlib.suppress(psycopg.OperationalError):
                while not over.is_set():
                    held.enter_context(contextlib.closing(psycopg.connect(url)))

        take()
        with contextlib.suppress(DBAPIError), lab.engine.connect() as connection:
            connection.execute(ended, {"hostile": HOSTILE})
        while not over.wait(0.02):
            take()
