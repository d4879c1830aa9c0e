"""The environment of worker and nodes, read by another process of the same user as a trainer could."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

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


LOOK = """
import json, subprocess, sys, time
from pathlib import Path
import psutil
from loractl.worker.storage.client import StoreClient

def shown(pid):
    try:
        return "read" if b"SECRET=swordfish" in Path(f"/proc/{pid}/environ").read_bytes() else "not yet"
    except OSError as error:
        return type(error).__name__

plain = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
store = StoreClient(Path(sys.argv[1]).as_uri())
try:
    store.fetch_dataset(f"{store.url}/datasets/{'0' * 64}.jsonl", "0" * 64, Path(sys.argv[1]))
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


def test_nor_that_of_the_process_that_makes_its_calls_of_the_store(tmp_path: Path) -> None:
    """It has the node's environment, and stays for the next call."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)], env={"SECRET": "swordfish", "LORACTL_HOME": str(tmp_path)},
        preexec_fn=as_no_root, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout) == ["ArtifactError", "read", "PermissionError"]
