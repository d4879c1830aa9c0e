"""`loractl worker` between its Ctrl-Cs: what it orders its nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import ExitCode
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.device.devices import SimulatedDevice
from loractl.worker.node import box
from loractl.worker.node.box import Box
from loractl.worker.node.box_identity import read_identity

from ..factories import node_state

NODE = 'trap "" TERM; echo > "$1.begun"; read order; echo "$order" > "$1"'
"""A node that goes on after SIGTERM, as one that writes a checkpoint, until it has an order."""


def test_a_second_ctrl_c_stops_at_once_however_soon_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the worker waits for its nodes, too: they would go on without it for as long as a checkpoint takes."""
    told, began, popen = tmp_path / "told", threading.Event(), subprocess.Popen

    def node(_: Any, **how: Any) -> subprocess.Popen[str]:
        process = popen(["sh", "-c", NODE, "sh", str(told)], **how)
        while not told.with_suffix(".begun").exists():
            assert process.poll() is None
        began.set()
        return process

    settings = load_settings({"LORACTL_HOME": str(tmp_path / "home"), "LORACTL_HOST": "box"})
    (settings.home / "run").mkdir(parents=True)
    device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)
    store = Store(connect(settings))
    store.see_node(node_state("box:0", **vars(read_identity(settings))))
    worker = Box(settings, store, [device], {})
    monkeypatch.setattr(box.subprocess, "Popen", node)
    monkeypatch.setattr(box.click, "echo", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    threading.Thread(target=lambda: began.wait(60) and os.kill(os.getpid(), signal.SIGINT), daemon=True).start()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        code = worker.run(drain_when_idle=False)
    except KeyboardInterrupt:
        pytest.fail("the worker has left its nodes to themselves")
    finally:
        signal.signal(signal.SIGTERM, terminate)
    assert (code, told.read_text()) == (ExitCode.INTERRUPTED, "now\n")
    assert store.nodes() == [], "status said for a minute that the worker is being stopped"
