"""Waiting for what processes do, by looks into the store: a command takes half a second of a processor each time."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
from sqlalchemy import Connection, text

from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.store.tables import Job

from .conftest import Cli


def until_job(cli: Cli, job_id: int, holds: Callable[[Job], object], seconds: float = 60) -> Job:
    """The job once `holds` is true of it; not when it has failed before, or after so many seconds."""
    engine = connect(load_settings(cli.environment))
    store, deadline = Store(engine), time.monotonic() + seconds
    try:
        while not holds(job := store.jobs.get(job_id)):
            told = f"{job.status} {job.stage} {job.step} {job.reason} {job.message}"
            assert job.status != "failed" and time.monotonic() < deadline, f"after {seconds} s: {told}"
            time.sleep(0.05)
        return job
    finally:
        engine.dispose()


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs still; it may end, and be reaped, while it is asked."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until_shown(pid: int) -> psutil.Process:
    """A process once others can see its environment: while it becomes another program, the kernel shows none, and
    `Popen` may return before that is over."""
    process, deadline = psutil.Process(pid), time.monotonic() + 20
    while not process.environ():
        assert is_alive(process) and time.monotonic() < deadline
        time.sleep(0.001)
    return process


_BLOCKED = text(  # a session that waits for a row names no database there
    "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted AND pid IN (SELECT pid FROM pg_locks"
    " WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)


def until_blocked(connection: Connection, sessions: int) -> None:
    """Once that many sessions of the connection's PostgreSQL database wait for a lock."""
    deadline = time.monotonic() + 30
    while connection.scalar(_BLOCKED) < sessions:
        assert time.monotonic() < deadline
