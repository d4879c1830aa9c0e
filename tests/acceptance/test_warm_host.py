"""A worker that keeps bases warm, as a person starts it: the next job goes on in the same process, no orphan."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ..conftest import Cli
from ..models import write_job
from ..waiting import is_alive, until_job

MEASURED = "job 1 has measured the base in this process, on the same rows"


@pytest.mark.cold
def test_the_second_job_on_a_base_starts_at_once_equal_to_the_first_and_a_killed_node_leaves_no_host(
    make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path
) -> None:
    cli, said = make_cli(), list[tuple[float, str]]()
    cli("status")
    worker = cli.start("worker", "--keep-warm", "5min")
    assert worker.stdout
    out = worker.stdout

    def read() -> None:
        for line in out:
            said.append((time.monotonic(), line))

    threading.Thread(target=read, daemon=True).start()

    def when(pattern: str) -> tuple[float, str]:
        """The worker's line like this: when it came, and its number."""
        deadline = time.monotonic() + 240
        while not (found := [(at, m) for at, line in said.copy() if (m := re.search(pattern, line))]):
            assert time.monotonic() < deadline and worker.poll() is None, said
            time.sleep(0.05)
        return found[0][0], found[0][1][1]

    try:
        job = write_job(tmp_path, tiny_model)
        cli("submit", job)
        host = int(when(r"process (\d+) keeps its base")[1])
        first = until_job(cli, 1, lambda job: job.status == "succeeded", seconds=60)
        cli("submit", job, "--set=lora.r=8")
        cli("submit", job)
        assert int(when(r"job 2: continues in process (\d+), which has its base")[1]) == host
        until_job(cli, 2, lambda job: job.status == "succeeded", seconds=60)
        third = until_job(cli, 3, lambda job: job.status == "succeeded", seconds=60)
        claimed, stepped = when(r"(job 3) \S+: attempt 1 with"), when(r"(job 3): step 1 of")
        print(f"claim to first step in a host: {stepped[0] - claimed[0]:.2f} s")
        log = cli("logs", 3).stdout
        assert "loaded already" in log and MEASURED in log
        assert "job 1" not in log.replace(MEASURED, ""), "the lines of a job are its own"
        assert _weights(first.adapter_uri) == _weights(third.adapter_uri), "warm or cold, it is the same adapter"
        kept = psutil.Process(host)
        assert is_alive(kept)
        for child in psutil.Process(worker.pid).children():
            if "loractl.worker.node" in child.cmdline():
                child.send_signal(signal.SIGKILL)
    finally:
        worker.kill()
        worker.wait()
    deadline = time.monotonic() + 30
    while is_alive(kept):
        assert time.monotonic() < deadline and os.getppid()
        time.sleep(0.1)


def _weights(uri: str | None) -> bytes:
    assert uri is not None
    return (Path(uri.removeprefix("file://")) / "adapter_model.safetensors").read_bytes()
