"""What docs/reliability.md promises of boxes that fail every job, or are wanted for another, in a held lab.

Those that freeze or die are processes: tests/acceptance/test_bad_boxes.py.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.job.status import Reason, Stage, Status
from loractl.common.lab_store import adopt
from loractl.common.store.records import Claim
from loractl.common.units import GIB
from loractl.worker.attempt import trainer_run
from loractl.worker.attempt.attempt import SupervisedAttempt
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import Watch
from loractl.worker.node import slots
from loractl.worker.node.health import leftovers
from loractl.worker.node.monitor import NodeOptions
from loractl.worker.protocol.messages import Ended, Start
from loractl.worker.recipe.orders import StopOrder

from ...held_lab import HeldLab
from ...quick_trainer import Sleep, Tell
from ..factories import node_state


def on_a_bad_card(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
    return Ended(job_id=order.job_id, reason=Reason.GPU_ERROR, message="CUDA error: the card has fallen off the bus")


def submit_until_drained(lab: HeldLab, target: str, seconds: float = 300) -> list[int]:
    """Jobs of four users at a time, until a card or box is closed; all of them succeed. Returns their numbers."""
    jobs, deadline = list[int](), lab.clock.now() + seconds
    while target not in lab.store.cards.drains():
        assert lab.clock.now() < deadline, f"{len(jobs)} jobs, and {target} is not closed"
        new = [lab.submit("--set=max_retries=0", user=user) for user in ("ada", "bob", "cyd", "dan")]
        for job_id in new:
            lab.until(job_id, lambda job: job.status is Status.SUCCEEDED, seconds)
        jobs += new
    return jobs


def test_a_card_that_fails_every_job_fails_no_job_for_good_and_is_closed(held: HeldLab) -> None:
    """It is always idle, so that the rule would choose it again and again."""
    held.start_box("owl", on_a_bad_card)
    held.start()
    for job_id in submit_until_drained(held, "owl:0"):
        assert held.store.attempts.of_job(job_id)[-1].node == "heron:0"
    assert any(
        attempt.node == "owl:0"
        for job in held.store.jobs.matching()
        for attempt in held.store.attempts.of_job(job.job_id)
    )
    (order,) = held.store.cards.drains().values()
    assert (order.target, order.user) == ("owl:0", "loractl")
    said = " ".join(held.cli("gpus").split())
    assert "drained by loractl: gpu_error in jobs" in said
    assert "the last: CUDA error: the card has fallen off the bus; check it, then loractl undrain owl:0" in said


def test_a_box_with_a_full_disk_fails_no_job_for_good_and_is_closed(held: HeldLab, tmp_path: Path) -> None:
    work = tmp_path / "owl" / "work"
    work.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(work)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        held.start_box("owl")
        healthy = held.start()
        for job_id in submit_until_drained(held, "owl"):
            assert held.store.jobs.get(job_id).retries_used == 0
        held.stop(healthy)
        last = held.submit()
        said = " ".join(held.cli("why", last).split())
        assert "Reason: drained, owl:0 is drained by loractl: disk_full in jobs" in said
        assert said.count("then loractl undrain owl") > 0
    finally:
        subprocess.run(["umount", "-l", str(work)], check=True)
    held.cli("undrain", "owl")
    held.until(last, lambda job: job.status is Status.SUCCEEDED)


def without_the_base(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
    what = f"base_model {order.spec.base_model} can't be loaded: there is no such folder on this box"
    return Ended(job_id=order.job_id, reason=Reason.BASE_MISSING, message=what)


def test_a_box_without_the_base_fails_no_job_that_another_box_can_train(held: HeldLab) -> None:
    """Its base_model is a folder that nobody copied to owl: no fault of the job's, and none of owl's for other jobs."""
    held.start_box("owl", without_the_base)
    held.start()
    jobs = [held.submit("--set=max_retries=0", user=user) for user in ("ada", "bob", "cyd", "dan", "ada", "bob")]
    for job_id in jobs:
        held.until(job_id, lambda job: job.status is Status.SUCCEEDED, 300)
        assert held.store.attempts.of_job(job_id)[-1].node == "heron:0"
    failed = [job_id for job_id in jobs if held.reasons(job_id)[0] is Reason.BASE_MISSING]
    assert failed and not held.store.cards.drains()
    assert "there is no such folder on this box" in " ".join(held.cli("status", failed[0], "--full").split())


def test_a_box_with_another_store_fails_no_job_and_takes_jobs_once_the_lab_s_is_mounted(
    held: HeldLab, tmp_path: Path
) -> None:
    """It would take all of them: it is always idle."""
    options = NodeOptions(store_mark=adopt(held.settings(), held.store, empty=True))
    mount, jobs = tmp_path / "mount", [held.submit() for _ in range(3)]
    mount.mkdir()
    held.start(options=options, LORACTL_HOST="owl", LORACTL_HOME=str(tmp_path / "owl"),
               LORACTL_ARTIFACTS_URL=mount.as_uri())  # fmt: skip
    held.until(jobs[0], lambda job: job.attempt == 1 and job.status is Status.QUEUED)
    held.clock.sleep(15)
    assert [held.reasons(job_id) for job_id in jobs] == [[Reason.DRAINED], [], []], "the card is closed by then"
    given_back = held.store.jobs.get(jobs[0])
    assert (given_back.held, given_back.retries_used, given_back.lab_failures) == (False, 0, 0)
    assert "is not the lab's artifact store: it has no mark" in " ".join(held.cli("gpus").split())
    assert "is not the lab's artifact store" in " ".join(held.cli("why", jobs[1]).split())

    healthy = held.start(options=options)
    for job_id in jobs:
        held.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    held.stop(healthy)
    assert list(mount.iterdir()) == [], "nothing was written"
    last = held.submit()
    held.clock.sleep(5)
    assert held.store.jobs.get(last).attempt == 0
    mount.rmdir()
    mount.symlink_to(held.home / "artifacts")
    held.until(last, lambda job: job.status is Status.SUCCEEDED)
    assert held.store.attempts.of_job(last)[-1].node == "owl:0"


def test_a_share_that_is_unmounted_during_a_training_costs_no_training(held: HeldLab) -> None:
    share, away = held.home / "artifacts", held.home / "away"
    options = NodeOptions(store_mark=adopt(held.settings(), held.store, empty=True))
    job_id = held.submit(steps=40)
    held.start(options=options)
    held.until(job_id, lambda job: (job.step or 0) > 2)
    other = held.submit()
    share.rename(away)
    share.mkdir()
    held.until(job_id, lambda job: job.stage is Stage.STORING)
    held.clock.sleep(10)
    assert held.store.jobs.get(job_id).stage is Stage.STORING and list(share.iterdir()) == []
    assert "has no mark; it is tried again" in " ".join(held.cli("status", job_id, "--full").split())
    share.rmdir()
    away.rename(share)
    for one in (job_id, other):
        held.until(one, lambda job: job.status is Status.SUCCEEDED)
    assert held.starts == [f"{job_id}.1", f"{other}.1"]


@pytest.mark.parametrize(("alive", "bytes_left", "what"), [([4711], 0, "process 4711"), ([], GIB, "1.0 GiB of memory")])
def test_a_card_on_which_something_of_an_attempt_remains_is_closed_with_the_reason(
    held: HeldLab, monkeypatch: pytest.MonkeyPatch, alive: list[int], bytes_left: int, what: str
) -> None:
    """What no signal ends, as a process that hangs in its driver; here nothing is really left."""
    place = replace(held.places()[0], held=lambda job_id: bytes_left)
    monkeypatch.setattr(trainer_run, "end_leftovers", lambda run: alive)
    job_id = held.submit()
    held.store.cards.see(node_state("heron:0", kind="sim"))
    claim, began = held.store.attempts.claim("heron:0"), held.clock.now()
    assert isinstance(claim, Claim)
    leftovers.close_if_left(place, claim, tuple)
    assert held.clock.now() - began >= trainer_run.LEFT_S, "the driver takes a moment"
    reason = f"job {job_id} left {what} behind; check the card, then loractl undrain heron:0"
    assert held.store.cards.drains()["heron:0"].reason == reason
    waiting = held.submit()
    assert reason in " ".join(held.cli("why", waiting).split())
    assert held.store.attempts.claim("heron:0") is None, "it takes nothing more until a person has looked"


@pytest.mark.parametrize("bytes_left", [0, GIB])
def test_what_a_job_s_next_attempt_holds_on_the_card_is_not_called_left_by_the_one_before_it(
    held: HeldLab, monkeypatch: pytest.MonkeyPatch, bytes_left: int
) -> None:
    """An attempt that lost its lease may end after the next one has begun in the card's other slot. The driver's word
    on memory is by job. What is left after both closes the card."""
    memory, took_s = [5 * GIB], 3 * trainer_run.LEFT_S
    place = replace(held.places()[0], held=lambda job_id: memory[0])
    job_id = held.submit()
    held.store.cards.see(node_state("heron:0", kind="sim"))
    claim = held.store.attempts.claim("heron:0")
    assert isinstance(claim, Claim)
    claims = iter([claim, replace(claim, attempt=2, token="next")])

    def trained(place: Workplace, attempt: SupervisedAttempt) -> None:
        if attempt.claim.attempt == 2:
            place.clock.sleep(took_s)
            assert not held.store.cards.drains()
            memory[0] = bytes_left
        attempt.own.closed = True

    monkeypatch.setattr(slots.Claimer, "claim", lambda _: next(claims, None))
    monkeypatch.setattr(slots, "supervise", trained)
    watch = Watch(device=place.device, node_pid=0, clock=held.clock)
    served = slots.Slots(place, watch, 2, changed=lambda: None, overheard=lambda: None)
    served.start()
    served.wake()
    held.clock.sleep(took_s + 2 * trainer_run.LEFT_S)
    served.close()
    assert [order.reason.partition(" behind")[0] for order in held.store.cards.drains().values()] == (
        [f"job {job_id} left 1.0 GiB of memory"] if bytes_left else []
    )


def test_a_preemptible_job_gives_way_with_a_checkpoint_and_finishes_later(held: HeldLab) -> None:
    held.start()
    unsaved = "--set=training.save_steps=100000"
    low = held.submit("--set=preemptible=true", unsaved, name="low", steps=120)
    held.until(low, lambda job: (job.step or 0) >= 5)
    high = held.submit("--set=priority=5", name="high")
    held.until(high, lambda job: job.status is Status.SUCCEEDED)

    given = held.store.attempts.of_job(low)[0]
    assert (given.reason, given.message) == (
        Reason.PREEMPTED,
        f"gave way to job {high}, which has a higher priority",
    )
    done = held.until(low, lambda job: job.status is Status.SUCCEEDED)
    assert (done.attempt, done.retries_used) == (2, 0)
    assert (held.store.attempts.of_job(low)[1].resumed_from_step or 0) >= 5
    assert f"asked to give way to job {high} (priority 5)" in held.cli("status", low, "--full")
