"""The environment of worker and nodes, and of what they start, read by another process of the same user as a trainer
could."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import redis

from loractl.common.queue.valkey import broker_url
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ...conftest import LORACTL

TRY = """
import ctypes, json, os, time
from pathlib import Path
from loractl.worker.protocol.secrecy import hide_environment

def reads(*, hidden):
    awake, go = os.pipe()
    if (node := os.fork()) == 0:
        if os.getuid() == 0:
            os.setuid(65534)  # root may read everything
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a process is that was started as this user
        if hidden:
            hide_environment()
        os.write(go, b".")
        time.sleep(60)
    os.read(awake, 1)
    answer, told = os.pipe()
    if os.fork() == 0:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            os.write(told, b"read" if b"SECRET=swordfish" in Path(f"/proc/{node}/environ").read_bytes() else b"none")
        except OSError as error:
            os.write(told, type(error).__name__.encode())
        os._exit(0)
    said = os.read(answer, 100).decode()
    os.kill(node, 9)
    return said

print(json.dumps([reads(hidden=False), reads(hidden=True)]))
"""


def test_a_trainer_can_t_read_the_environment_of_a_node_through_proc() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRY], env={"SECRET": "swordfish"}, capture_output=True, text=True, check=True, timeout=30
    )
    assert json.loads(done.stdout) == ["read", "PermissionError"]


SHOWN = """
from pathlib import Path

def shown(pid):
    try:
        return "read" if b"=swordfish" in Path(f"/proc/{pid}/environ").read_bytes() else "without"
    except OSError as error:
        return type(error).__name__
"""
LOOK = f"""{SHOWN}
import json, subprocess, sys, time
import psutil
from loractl.worker.attempt.storage.client import StoreClient

plain = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
store = StoreClient(Path(sys.argv[1]).as_uri())
try:
    store.fetch_dataset(f"{{store.url}}/datasets/{{'0' * 64}}.jsonl", "0" * 64, Path(sys.argv[1]))
except Exception as error:
    answered = type(error).__name__
(calls,) = [p.pid for p in psutil.Process().children() if p.pid != plain.pid]
print(json.dumps([answered, shown(plain.pid), shown(calls)]))
"""


def as_no_root() -> None:
    """Takes away what root may beyond its own files (PR_CAPBSET_DROP); others have none of it."""
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)


def test_a_trainer_can_t_read_the_environment_of_the_process_that_calls_the_store(tmp_path: Path) -> None:
    """It has the node's environment, and stays for the next call."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)], env={"SECRET": "swordfish", "LORACTL_HOME": str(tmp_path)},
        preexec_fn=as_no_root, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout) == ["ArtifactError", "read", "PermissionError"]


READ = f"import json, sys\n{SHOWN}\nprint(json.dumps([shown(pid) for pid in sys.argv[1:]]))"


def test_a_trainer_can_t_read_the_environment_of_a_real_worker_its_node_and_its_queue(home: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "LORACTL_HOME": str(home), "LORACTL_DEVICES": "cpu"}
    engine = connect(load_settings(environment))
    secret, plain = {**environment, "PGPASSWORD": "swordfish"}, [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(plain, env=secret, stdin=subprocess.PIPE, preexec_fn=as_no_root) as open_one,
        subprocess.Popen([LORACTL, "worker"], env=secret, stderr=subprocess.DEVNULL, preexec_fn=as_no_root) as worker,
    ):
        try:
            deadline = time.monotonic() + 60
            while not Store(engine).cards.nodes():  # then both have begun
                assert worker.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            (node,) = [p for p in psutil.Process(worker.pid).children() if "loractl.worker.node" in p.cmdline()]
            queue = redis.Redis.from_url(broker_url(load_settings(environment)).replace("redis+socket", "unix"))
            pids = [open_one.pid, worker.pid, node.pid, queue.info("server")["process_id"]]
            read = subprocess.run(
                [sys.executable, "-c", READ, *map(str, pids)],
                preexec_fn=as_no_root, capture_output=True, text=True, check=True, timeout=30,
            )  # fmt: skip
        finally:
            for process in (worker, node, open_one):
                process.kill()
            engine.dispose()
    told = dict(zip(("plain", "worker", "node", "queue"), json.loads(read.stdout), strict=True))
    assert told == {"plain": "read", "worker": "PermissionError", "node": "PermissionError", "queue": "without"}
