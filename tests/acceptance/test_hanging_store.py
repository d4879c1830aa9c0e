"""An artifact store that hangs without an error makes no job and no worker unstoppable.

The way to S3 passes nothing on, and a named pipe stands where a data set was, as a network disk without its server.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from loractl.common.job.status import Reason, Stage, Status

from ..chaos.proxy import Link, Proxy
from ..services import S3
from ..waiting import is_alive
from .quick_lab import Lab

STOP_S = 25.0
"""A wish acts within this: half a lease of silence, some beats, and this machine's load."""


@pytest.fixture
def s3(s3_server: S3) -> Iterator[tuple[Link, dict[str, str]]]:
    """A link to S3, and the environment to go through it."""
    with Proxy() as proxy:
        link = proxy.to_port(urlsplit(s3_server.environment["AWS_ENDPOINT_URL"]).port or 0)
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{link.port}"}
        yield link, {**s3_server.environment, **endpoint, "LORACTL_ARTIFACTS_URL": s3_server.url}


def history(lab: Lab, job_id: int) -> list[str]:
    return [event.text for event in lab.store.jobs.events(job_id)]


def waits_for(lab: Lab, job_id: int, what: str, attempt: int) -> None:
    """Until the history of this attempt says that it waits for the store."""
    deadline = time.monotonic() + 40
    begins = f"waits for the artifact store: {what}"
    while not any(e.attempt == attempt and e.text.startswith(begins) for e in lab.store.jobs.events(job_id)):
        assert time.monotonic() < deadline, history(lab, job_id)
        time.sleep(0.1)


def test_cancel_drain_time_limit_and_sigterm_act_while_s3_passes_nothing_on(
    lab: Lab,
    s3: tuple[Link, dict[str, str]],
) -> None:
    link, environment = s3
    lab.cli = lab.cli.with_environment(**environment)
    late = "--set=training.save_steps=20"  # a second after the way has fallen silent
    cancelled, drained = lab.submit("--set=priority=2", late, steps=60), lab.submit("--set=priority=1")
    limited = lab.submit("--set=resources.time_limit=3s", "--set=training.save_steps=4", steps=4000)
    worker = lab.start()
    lab.until(cancelled, lambda job: job.step)
    link.silence("up")

    lab.until(cancelled, lambda job: job.stage is Stage.STORING)
    waits_for(lab, cancelled, f"writing jobs/{cancelled}/", attempt=1)
    lab.cli("cancel", cancelled)
    lab.until(cancelled, lambda job: job.status is Status.CANCELLED, STOP_S)

    waits_for(lab, drained, f"writing jobs/{drained}/", attempt=1)
    lab.cli("drain", "heron", "--now", "--reason", "a new disk")
    lab.until(drained, lambda job: job.status is Status.QUEUED, STOP_S)
    lab.cli("hold", drained)
    lab.cli("undrain", "heron")

    waits_for(lab, limited, f"writing jobs/{limited}/checkpoints/1-", attempt=1)
    done = lab.until(limited, lambda job: job.status is Status.FAILED, STOP_S)
    assert done.reason is Reason.TIMED_OUT

    lab.cli("release", drained)
    waits_for(lab, drained, f"looking for jobs/{drained}/attempt-2/", attempt=2)
    _ends(worker)
    assert lab.reasons(drained) == [Reason.DRAINED] * 2

    link.heal()
    lab.start()
    lab.until(drained, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts().count(f"{drained}.1") == 1 and len(lab.starts()) == 3, "nothing was trained again"


@pytest.mark.long
def test_a_worker_ends_while_it_fetches_from_a_disk_that_hangs(lab: Lab, home: Path) -> None:
    job_id = lab.submit()
    (data,) = (home / "artifacts" / "datasets").iterdir()
    kept = data.rename(data.with_suffix(".kept"))
    os.mkfifo(data)
    worker = lab.start(cold=True)
    waits_for(lab, job_id, f"reading datasets/{data.name}", attempt=1)
    helpers = [p for p in psutil.Process(worker.pid).children(recursive=True) if _calls_the_store(p)]
    assert helpers
    _ends(worker)
    assert lab.reasons(job_id) == [Reason.DRAINED] and not any(map(is_alive, helpers))
    kept.replace(data)
    lab.start()
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    row = json.loads(lab.cli("status", job_id, "--json").stdout)
    assert row["attempt"] == 2


def _ends(worker: subprocess.Popen[str]) -> None:
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=STOP_S) == 0


def _calls_the_store(process: psutil.Process) -> bool:
    return "loractl.worker.attempt.storage" in process.cmdline()
