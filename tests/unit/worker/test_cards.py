"""Cards that fail, in a held lab: they are closed, one by one. What NVML says of them: test_devices.py."""

from __future__ import annotations

from loractl.common.job.status import Status
from loractl.common.units import GIB
from loractl.worker.node.monitor import SEE_S

from ...held_lab import HeldLab, ShownCard

LOST = "the driver has lost it: look for Xid in dmesg, then reset it or reboot the box"
UPDATED = "NVIDIA's library and kernel driver have different versions: reboot the box"


def faults(lab: HeldLab) -> dict[str, str | None]:
    return {row.node: row.fault for row in lab.store.cards.nodes()}


def test_a_lost_card_is_closed_and_the_other_goes_on(held: HeldLab) -> None:
    small, large = ShownCard(fault=LOST), ShownCard(number="1", uuid="GPU-bbbb", total=80 * GIB)
    held.start(devices=[small, large], LORACTL_LEASE="60s")
    assert faults(held) == {"heron:0": LOST, "heron:1": None}
    assert "closed: the driver has lost it: look for Xid" in " ".join(held.cli("gpus").split())
    jobs = [held.submit() for _ in range(3)]
    for job_id in jobs:
        held.until(job_id, lambda job: job.status is Status.SUCCEEDED)
        assert [attempt.node for attempt in held.store.attempts.of_job(job_id)] == ["heron:1"]

    small.fault = None
    held.clock.sleep(SEE_S)
    assert faults(held) == {"heron:0": None, "heron:1": None}, "a reset card comes back by itself"
    large.fault = LOST
    held.clock.sleep(SEE_S)
    again = held.submit()
    held.until(again, lambda job: job.status is Status.SUCCEEDED)
    assert [attempt.node for attempt in held.store.attempts.of_job(again)] == ["heron:0"]

    small.fault = large.fault = UPDATED  # a driver's update, which the running nodes meet at their next look
    held.clock.sleep(SEE_S)
    assert faults(held) == {"heron:0": UPDATED, "heron:1": UPDATED}, "no node ended for it"
    last = held.submit()
    held.clock.sleep(60.0)
    assert held.store.attempts.of_job(last) == []
    assert "Reason: closed, heron:0 is closed: NVIDIA's library" in " ".join(held.cli("why", last).split())
