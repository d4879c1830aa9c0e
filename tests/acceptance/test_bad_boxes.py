"""What docs/reliability.md promises of boxes that freeze, die, fail every job, or are wanted for another.

Real workers with a quick trainer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.settings import load_settings
from loractl.common.store.records import Claim
from loractl.worker.attempt.drain import Drain
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.devices import find_devices
from loractl.worker.device.occupancy import Watch
from loractl.worker.node.health import leftovers
from loractl.worker.storage.client import StoreClient

from ..unit.factories import node_state
from .quick_lab import LEASE_S, Lab, family, freeze, until


def test_a_frozen_worker_that_wakes_up_after_its_lease_is_refused_and_its_files_are_not_listed(
    lab: Lab, home: Path, tmp_path: Path
) -> None:
    job_id = lab.submit("--set=training.save_steps=10", steps=80)
    first = lab.start(cold=True)
    frozen_at = lab.until(job_id, lambda job: (job.step or 0) >= 20).step or 0
    frozen = freeze(lambda: family(first.pid), home / "loractl.db")
    began = time.monotonic()
    lab.start_box("owl", LORACTL_DEVICES="cpu")
    lab.until(job_id, lambda job: job.attempt == 2 and job.step)
    noticed = time.monotonic() - began
    assert noticed < LEASE_S + 20, f"noticed within the lease, and a worker's start: {noticed:.0f} s"
    resumed = lab.store.attempts(job_id)[1].resumed_from_step or 0
    assert resumed >= frozen_at - 10, "at most one checkpoint interval is lost"
    for process in frozen:
        process.send_signal(signal.SIGCONT)
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.reasons(job_id) == [Reason.WORKER_LOST, Reason.OK]
    (adapter,) = lab.store.adapters()
    assert adapter.uri.endswith(f"jobs/{job_id}/attempt-2/adapter")
    lab.cli("adapters", "pull", job_id, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapter_model.safetensors").read_text() == "weights of attempt 2"
    _gone(lambda: [p for p in family(first.pid) if "quick_trainer" in p.cmdline()])


def test_a_job_that_kills_its_worker_three_times_is_held_with_the_reason(lab: Lab) -> None:
    poison = lab.submit("--set=labels.kills-its-worker=always", "--set=max_retries=0", name="poison")
    lab.start(cold=True)
    held = lab.until(poison, lambda job: job.held, seconds=90)
    assert held.status is Status.QUEUED
    assert lab.reasons(poison) == [Reason.WORKER_LOST] * 3
    assert "its worker was lost 3 times in a row; it may be what kills them" in lab.cli("status", poison).stdout
    good = lab.submit()
    lab.until(good, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts().count(f"{poison}.4") == 0, "it is not tried again until a person releases it"


BAD_CARD = """
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.training.trainer import main


def run(order, orders, tell):
    return Ended(job_id=order.job_id, reason=Reason.GPU_ERROR, message="CUDA error: the card has fallen off the bus")


if __name__ == "__main__":
    main(run)
"""


def test_a_card_that_fails_every_job_fails_no_job_for_good_and_is_closed(lab: Lab, tmp_path: Path) -> None:
    """It is always idle, so that the rule would choose it again and again."""
    (tmp_path / "quick" / "bad_card.py").write_text(BAD_CARD)
    lab.start_box("owl", LORACTL_TRAINER="bad_card")
    lab.start(LORACTL_DEVICES="sim:8GiB")
    until(lambda: len(lab.store.nodes()) == 2)
    for job_id in lab.submit_until_drained("owl:0"):
        assert lab.store.attempts(job_id)[-1].node == "heron:0"
    (order,) = lab.store.drains().values()
    assert (order.target, order.user) == ("owl:0", "loractl")
    said = " ".join(lab.cli.with_environment(COLUMNS="300")("gpus").stdout.split())
    assert "drained by loractl: gpu_error in jobs" in said
    assert "the last: CUDA error: the card has fallen off the bus; look at it, then loractl undrain owl:0" in said


def test_a_box_with_a_full_disk_fails_no_job_for_good_and_is_closed(lab: Lab, tmp_path: Path) -> None:
    work = tmp_path / "owl" / "work"
    work.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(work)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        owl = lab.start_box("owl")
        healthy = lab.start(LORACTL_DEVICES="sim:8GiB")
        until(lambda: len(lab.store.nodes()) == 2)
        for job_id in lab.submit_until_drained("owl"):
            assert lab.store.job(job_id).retries_used == 0
        healthy.send_signal(signal.SIGINT)
        healthy.wait(timeout=60)
        last = lab.submit()
        said = " ".join(lab.cli.with_environment(COLUMNS="300")("why", last).stdout.split())
        assert "Reason: drained, owl:0 by loractl: disk_full in jobs" in said
        assert said.count("then loractl undrain owl") > 0
    finally:
        subprocess.run(["umount", "-l", str(work)], check=True)
    lab.cli("undrain", "owl")
    lab.until(last, lambda job: job.status is Status.SUCCEEDED)
    assert owl.poll() is None


def test_a_card_on_which_something_of_an_attempt_remains_is_closed_with_the_reason(
    lab: Lab, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no signal ends, as a process that hangs in its driver; here nothing is really left."""
    settings = load_settings(lab.cli.environment)
    (device,) = find_devices(settings)
    monkeypatch.setattr(leftovers, "end_leftovers", lambda run: [4711])
    monkeypatch.setattr(leftovers, "LEFT_S", 0.0)
    job_id = lab.submit()
    lab.store.see_node(node_state("heron:0", kind="cpu"))
    claim = lab.store.claim("heron:0")
    assert isinstance(claim, Claim)
    place = Workplace(
        settings=settings, store=lab.store, artifacts=StoreClient(settings.artifacts_url), device=device,
        node="heron:0", drain=Drain(), threads=1,
    )  # fmt: skip
    leftovers.close_if_left(place, Watch(device=device, node_pid=os.getpid()), claim)
    reason = f"job {job_id} left process 4711 behind; look at the card, then loractl undrain heron:0"
    assert lab.store.drains()["heron:0"].reason == reason
    waiting = lab.submit()
    assert reason in " ".join(lab.cli("why", waiting).stdout.split())
    assert lab.store.claim("heron:0") is None, "it takes nothing more until a person has looked"


def test_a_preemptible_job_gives_way_with_a_checkpoint_and_finishes_later(lab: Lab) -> None:
    lab.start(LORACTL_DEVICES="sim:8GiB")
    unsaved = "--set=training.save_steps=100000"
    low = lab.submit("--set=preemptible=true", unsaved, name="low", steps=120)
    lab.until(low, lambda job: (job.step or 0) >= 5)
    high = lab.submit("--set=priority=5", name="high")
    lab.until(high, lambda job: job.status is Status.SUCCEEDED)

    given = lab.store.attempts(low)[0]
    assert (given.reason, given.message) == (
        Reason.PREEMPTED,
        f"gave way to job {high}, which has a higher priority",
    )
    done = lab.until(low, lambda job: job.status is Status.SUCCEEDED)
    assert (done.attempt, done.retries_used) == (2, 0)
    assert (lab.store.attempts(low)[1].resumed_from_step or 0) >= 5
    assert f"asked to give way to job {high} (priority 5)" in lab.cli("show", low).stdout


def _gone(alive: Callable[[], list[psutil.Process]], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while left := alive():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
