"""What docs/reliability.md promises of boxes that freeze or die: real workers with a quick trainer.

Boxes that fail every job, or are wanted for another: tests/unit/worker/test_bad_boxes.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from loractl.common.job.status import Reason, Status

from ..models import weights_of
from .quick_lab import LEASE_S, Lab, family, freeze, until


def test_a_frozen_worker_that_wakes_up_after_its_lease_is_refused_and_its_files_are_not_listed(
    lab: Lab, home: Path, tmp_path: Path
) -> None:
    lab.start_box("owl", LORACTL_DEVICES="cpu")  # before: how long a start takes is the machine's affair
    until(lambda: lab.store.cards.fleet().nodes.keys() == {"owl:0"})
    lab.cli("drain", "owl", "--reason", "the job begins elsewhere")
    job_id = lab.submit("--set=training.save_steps=10", steps=80)
    first = lab.start(cold=True)
    frozen_at = lab.until(job_id, lambda job: (job.step or 0) >= 20).step or 0
    frozen = freeze(lambda: family(first.pid), home / "loractl.db")
    began = time.monotonic()
    lab.cli("undrain", "owl")
    lab.until(job_id, lambda job: job.attempt == 2 and job.step)
    noticed = time.monotonic() - began
    assert noticed < LEASE_S + 20, f"noticed within the lease, and a trainer's start: {noticed:.0f} s"
    resumed = lab.store.attempts.of_job(job_id)[1].resumed_from_step or 0
    assert resumed >= frozen_at - 10, "at most one checkpoint interval is lost"
    for process in frozen:
        process.send_signal(signal.SIGCONT)
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.reasons(job_id) == [Reason.WORKER_LOST, Reason.OK]
    (adapter,) = lab.store.adapters.all()
    assert adapter.uri.endswith(f"jobs/{job_id}/attempt-2/adapter")
    lab.cli("adapters", "pull", job_id, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapter_model.safetensors").read_bytes() == weights_of("attempt 2")
    _gone(lambda: [p for p in family(first.pid) if "tests.quick_trainer" in p.cmdline()])


def _gone(alive: Callable[[], list[psutil.Process]], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while left := alive():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
