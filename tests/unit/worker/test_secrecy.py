"""The environment of worker and nodes, read by another process of the same user as a trainer could."""

from __future__ import annotations

import json
import subprocess
import sys

TRY = """
import ctypes, json, os, time
from pathlib import Path
from loractl.worker.node.secrecy import hide_environment

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
