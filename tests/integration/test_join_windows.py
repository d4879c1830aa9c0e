"""Narrow moments of a trainer that several jobs share, held open: one of them leaves or fails while another comes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Claim
from loractl.worker.attempt import trainer_process as module
from loractl.worker.attempt import trainer_run
from loractl.worker.attempt.log import LOG_FILE
from loractl.worker.attempt.workplace import Workplace

from ..unit.factories import submission
from .test_hosts import until
from .test_joined import QUICK, Crowd, crowd
from .test_joined import place as place

HELD = """
import time
from loractl.worker.recipe.members import Members

HERE = Path(__file__).parent

def wait_for(name):
    while (HERE / "held").exists() and not (HERE / name).exists():
        time.sleep(0.02)

def held(self, over, finish=Members.finish):
    (HERE / "finishing").touch()
    job, real, queues = over.order.job_id, self._tell, self._desk._members
    def tell(message):
        real(message)
        if type(message).__name__ == "MemberLeft" and (HERE / "comes back").exists():
            (HERE / "comes back").unlink()
            before = queues.get(job)
            while queues.get(job) in (before, None):
                time.sleep(0.02)
    self._tell = tell
    wait_for("tell")
    goes_on = finish(self, over)
    wait_for("go on")
    if (HERE / "held").exists():
        sys.stderr.write("late words of the first\\n")
        exec((HERE / "held").read_text())
        (HERE / "held").unlink()
    return goes_on

Members.finish = held
"""
"""The main thread tells the end of a job, and what comes meanwhile waits."""

CLOSES = """
        if does == "closes" and (Path(order.output_dir).parent / "end").exists():
            os.closerange(0, 64)  # as a process that ends, while the card's driver takes its time
            import time
            while not (Path(order.output_dir).parent / "gone").exists():
                time.sleep(0.02)
            os._exit(0)
        if (Path(order.output_dir).parent / "end").exists():
"""


@pytest.fixture(autouse=True)
def _quick(place: Workplace, tmp_path: Path) -> None:
    """The trainers of test_joined, which stop where a test has them stop."""
    ends = '        if (Path(order.output_dir).parent / "end").exists():\n'
    assert ends in QUICK
    text = QUICK.replace(ends, CLOSES.removeprefix("\n")).replace("\ndef run(", HELD + "\ndef run(")
    (tmp_path / "quick.py").write_text(text)


def _comes(own: Crowd) -> Claim:
    """A job that begins to join the others; it may not be in yet."""
    own.store.jobs.submit(submission(base_model="org/a", labels={"does": "steps"}, lora=1, method="lora"))
    claim = own.store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    claim = replace(claim, packs=True, joins=True, host=own.rows[0])
    own.follow(claim)
    return claim


def _comes_as_the_last_leaves(own: Crowd, folder: Path, then: str = "") -> int:
    """Another job comes while the trainer tells the end of its last one, who has left before the trainer answers. The
    trainer does `then` before it does."""
    first = own.start()
    until(lambda: own.rows)
    link = own.states[first].run.trainer
    assert link is not None
    (folder / "held").write_text(then)
    (own.states[first].folder / "end").touch()
    until((folder / "finishing").exists)
    second = _comes(own).job_id
    until(lambda: link.trainer.count == 2)
    (folder / "tell").touch()
    until(lambda: own.states[first].heard.ended is not None)
    own.threads[first].join(timeout=1)  # it must not leave before
    (folder / "go on").touch()
    return second


def test_a_trainer_that_freezes_between_two_jobs_is_ended_by_the_one_that_was_to_join(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 2.0)
    monkeypatch.setattr(trainer_run, "JOIN_S", 2.0)
    with crowd(place) as own:
        second = _comes_as_the_last_leaves(own, tmp_path, "import signal; os.kill(os.getpid(), signal.SIGSTOP)")
        own.join(second)
        job = place.store.jobs.get(second)
        assert (job.status, job.reason, job.retries_used) == (Status.QUEUED, Reason.HOST_LOST, 0)
        until(lambda: not own.marks_of_processes(), seconds=5)
        until(lambda: own.rows == [] and not own.hosts.marks, seconds=5)


def test_no_line_of_one_that_has_left_comes_into_the_log_of_one_that_joins(place: Workplace, tmp_path: Path) -> None:
    with crowd(place) as own:
        second = _comes_as_the_last_leaves(own, tmp_path)
        until(lambda: own.states[second].heard.step >= 1)
        assert f"line of {second}" in own.log(second) and "late words" not in own.log(second)
        own.end(second)


def test_a_job_may_come_back_as_soon_as_it_has_left(place: Workplace, tmp_path: Path) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        second, host = own.start(joins=True), own.rows[0]
        (tmp_path / "comes back").touch()
        own.states[second].wishes.card_drained = "box:0 is drained"
        own.join(second)
        claim = place.store.attempts.claim("box:0")
        assert isinstance(claim, Claim) and (claim.job_id, claim.attempt) == (second, 2)
        own.follow(replace(claim, packs=True, joins=True, host=host))
        until(lambda: own.states[second].heard.step >= 1 or not own.threads[second].is_alive())
        assert own.threads[first].is_alive() and own.threads[second].is_alive()
        own.end(first)
        own.end(second)


def test_who_comes_into_a_trainer_that_is_ending_goes_back_free_of_charge(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_run, "JOIN_S", 2.0)
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        last = own.start("closes", joins=True)
        own.end(first)
        (own.states[last].folder / "end").touch()
        link = own.states[last].run.trainer
        assert link is not None
        readers = link.trainer._readers
        until(lambda: not any(reader.is_alive() for reader in readers))
        assert psutil.pid_exists(link.pid), "its pipes are closed, and it has not ended"
        second = _comes(own).job_id
        own.join(second)
        (own.states[last].folder / "gone").touch()
        own.join(last)
        job = place.store.jobs.get(second)
        assert (job.status, job.reason, job.retries_used) == (Status.QUEUED, Reason.HOST_LOST, 0), job.message
        until(lambda: own.rows == [])


def _fill_disk(own: Crowd, job: int) -> None:
    """Let no more lines into the job's log."""
    file = own.states[job].folder / LOG_FILE
    until(file.exists)
    file.unlink()
    file.symlink_to("/dev/full")


def test_a_full_disk_at_the_moment_of_a_join_leaves_nobody_in_the_trainer(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        pid, link = own.pid(first), own.states[first].run.trainer
        assert link is not None
        os.kill(pid, signal.SIGSTOP)
        second = _comes(own).job_id
        until(lambda: link.trainer.count == 2)
        _fill_disk(own, second)
        os.kill(pid, signal.SIGCONT)
        until(lambda: own.states[second].heard.step >= 1 or not own.threads[second].is_alive())
        own.end(second)
        assert link.trainer.count == 1
        own.end(first)


def test_a_full_disk_as_a_job_takes_a_waiting_trainer_leaves_no_process(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        pid = own.pid(first)
        own.end(first)
        until(lambda: own.card.waiting_bases)
        os.kill(pid, signal.SIGSTOP)
        claim = own.claim("steps")
        own.follow(claim)
        _fill_disk(own, claim.job_id)
        os.kill(pid, signal.SIGCONT)
        until(lambda: own.states[claim.job_id].heard.step >= 1 or not own.threads[claim.job_id].is_alive())
        own.end(claim.job_id)
