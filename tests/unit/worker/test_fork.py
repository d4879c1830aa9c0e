"""A pool child comes by fork, and may come while the node's monitor writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORKS = """
import os, sqlite3, sys, threading, time

from loractl.common.store.database import make_engine
from loractl.common.store.schema import upgrade
from loractl.common.settings import load_settings
from loractl.common.store.store import Store
from loractl.worker.device.devices import find_devices
from loractl.worker.node.node import Node, NodeOptions

settings = load_settings()
settings.runtime_dir.mkdir(mode=0o700)
node = Node(settings, find_devices(settings)[0], NodeOptions())
engine = make_engine(settings.database_url)
upgrade(engine)
if sys.argv[1] == "guarded":
    node.fork_between_transactions()
inside = threading.Event()


def monitor():
    with node._in_database, Store(engine)._write() as transaction:
        transaction.session.connection()
        inside.set()
        time.sleep(0.5)


thread = threading.Thread(target=monitor)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    time.sleep(1)
    connection = sqlite3.connect(settings.home / "loractl.db", timeout=0.1, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        os._exit(3)
    os._exit(0)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(("how", "code"), [("guarded", 0), ("unguarded", 3)])
def test_a_child_that_comes_in_mid_transaction_can_write_all_the_same(tmp_path: Path, how: str, code: int) -> None:
    """Unguarded it can't: the day that this fails, SQLite has learned to fork and the guard may go."""
    environment = {"LORACTL_HOME": str(tmp_path), "LORACTL_DEVICES": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, how], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
