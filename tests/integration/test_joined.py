"""Jobs that join a trainer which has others, on real processes: each is alone in its end, and who is last ends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.status import Reason, Status
from loractl.common.placement.cards import Card
from loractl.common.store.database import connect
from loractl.common.store.records import Beat, Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.verbs import AttemptVerbs
from loractl.common.units import GIB
from loractl.worker.attempt import stops
from loractl.worker.attempt import trainer_process as module
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.log import LogBook
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import run_mark
from loractl.worker.node.health.leftovers import close_if_left, end_strays
from loractl.worker.protocol.idle_trainer import by_mark

from ..unit.factories import node_state, submission
from .test_hosts import Lab, until

QUICK = """
import os, queue, sys
from pathlib import Path
from loractl.common.job.status import Reason, Stage
from loractl.worker.protocol.messages import Ended, LogLines, Opened, Passed, StageChanged, Stepped, Stop
from loractl.worker.recipe.trainer import main

def run(order, orders, tell):
    job, does = order.job_id, order.spec.labels["does"]
    def ended(reason):
        base = None if does == "spoils" else 2**20
        return Ended(job_id=job, reason=reason, message=f"{os.getpid()}", base_bytes=base)
    sys.stderr.write(f"job {job} prints\\n")
    tell(StageChanged(job_id=job, stage=Stage.TRAINING))
    tell(LogLines(job_id=job, text=f"line of {job}\\n"))
    tell(Opened(job_id=job, base_bytes=2**20))
    tell(Passed(job_id=job, tokens=100, members=1, seconds=0.5))
    step = 0
    while True:
        step += 1
        if does != "silent" or step == 1:
            tell(Stepped(job_id=job, step=step, total_steps=9))
        if (Path(order.output_dir).parent / "end").exists():
            return ended(Reason.OUT_OF_MEMORY if does == "grows" else Reason.BAD_DATA)
        try:
            message = orders.get(timeout=0.05)
        except queue.Empty:
            continue
        if isinstance(message, Stop) and does != "deaf":
            return ended(Reason.DRAINED if message.save else Reason.CANCELLED)

if __name__ == "__main__":
    sys.exit(main(run))
"""


@pytest.fixture
def place(quick_place: Callable[[str], Workplace]) -> Workplace:
    """Its trainers do what QUICK says, and may be joined. A beat a second."""
    place = quick_place(QUICK)
    place.store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB, max_jobs=4))
    return replace(place, settings=replace(place.settings, lease_s=6))


class Crowd(Lab):
    """A node's hosts, and jobs that run beside each other."""

    def __init__(self, place: Workplace) -> None:
        super().__init__(place)
        self.states: dict[int, SupervisedAttempt] = {}
        self.threads: dict[int, threading.Thread] = {}

    def start(self, does: str = "steps", *, joins: bool = False) -> int:
        """Begin a job, in a trainer of its own or in that of the others; its number once it trains."""
        self.store.jobs.submit(submission(base_model="org/a", labels={"does": does}, lora=1, method="lora"))
        claim = self.store.attempts.claim("box:0")
        assert isinstance(claim, Claim)
        self.follow(replace(claim, packs=True, joins=joins, host=self.rows[0] if joins else None))
        until(lambda: self.states[claim.job_id].heard.step >= 1)
        return claim.job_id

    def follow(self, claim: Claim) -> None:
        state = self.states[claim.job_id] = begin(claim, self.place.settings.work_dir)

        def work() -> None:
            supervise(self.place, state)
            close_if_left(self.place, self.watch, claim, state.run.host)

        thread = self.threads[claim.job_id] = threading.Thread(target=work)
        thread.start()

    def end(self, job: int) -> None:
        (self.states[job].folder / "end").touch()
        self.join(job)

    def join(self, *jobs: int) -> None:
        for job in jobs:
            self.threads[job].join(timeout=40)
            assert not self.threads[job].is_alive()

    @property
    def card(self) -> Card:
        return self.store.cards.fleet().cards["box:0"]

    def pid(self, job: int) -> int:
        (pid,) = self.states[job].run.pids
        return pid

    def log(self, job: int) -> str:
        return (self.states[job].folder / "log.txt").read_text() if self.states[job].folder.exists() else ""


@contextmanager
def crowd(place: Workplace) -> Iterator[Crowd]:
    own = Crowd(place)
    own.hosts.start()
    try:
        yield own
    finally:
        for state in own.states.values():
            state.own.lease_lost = True
        own.join(*own.threads)
        own.hosts.stop()
    assert own.marks_of_processes() == set() and own.hosts.marks == frozenset() and own.rows == []


def test_a_job_joins_goes_on_when_the_first_has_ended_and_leaves_the_base_warm(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        second = own.start(joins=True)
        assert own.pid(first) == own.pid(second)
        assert own.marks_of_processes() == set(own.rows), "who ends an attempt's processes does not find it"
        assert set(by_mark(own.watch.look().used)) == {own.rows[0]}
        end_strays(own.place)
        assert place.store.hosts.of_card("box:0")[0].law is not None, "passes were measured"
        lines = own.log(first), own.log(second)
        assert [f"job {n} prints" in lines[n - 1] for n in (first, second)] == [True, False], "it prints as nobody's"
        assert f"line of {second}" in lines[1] and f"line of {second}" not in lines[0]
        own.end(first)
        assert place.store.jobs.get(first).reason is Reason.BAD_DATA
        assert psutil.pid_exists(own.pid(second)) and own.threads[second].is_alive()
        place.store.jobs.submit(submission(base_model="org/a", labels={"does": "steps"}, lora=1, method="lora"))
        assert place.store.attempts.claim("box:0", 0, {own.rows[0]: 24 * GIB}, joins=True) is None, (
            "its process has the card"
        )
        third = own.start(joins=True)
        own.end(second)
        own.end(third)
        assert own.pid(third) == own.pid(first) and len(own.rows) == 1, "the last one leaves it warm"
        late, later = own.start(joins=True), own.start(joins=True)
        assert own.pid(late) == own.pid(later) == own.pid(first), "one comes just when the others have ended"
        own.end(late)
        own.end(later)
        claim = own.claim("steps")
        assert claim.host == own.rows[0]
        own.follow(claim)
        until(lambda: own.states[claim.job_id].heard.step >= 1)
        assert own.pid(claim.job_id) == own.pid(first)
        own.end(claim.job_id)


def test_a_cancelled_member_leaves_alone_and_a_lost_lease_ends_no_other(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        second, third = own.start(joins=True), own.start(joins=True)
        place.store.jobs.cancel(second, "ada")
        own.join(second)
        assert place.store.jobs.get(second).status is Status.CANCELLED
        own.states[first].own.lease_lost = True
        own.join(first)
        assert own.threads[third].is_alive() and psutil.pid_exists(own.pid(third))
        own.end(third)
        assert place.store.jobs.get(third).reason is Reason.BAD_DATA


@pytest.mark.parametrize("meanwhile", ["its result is stored", "its end waits for the database"])
def test_an_attempt_that_is_lost_when_its_trainer_stays_is_out_of_it(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        keep, finish = own.hosts.keep, place.store.attempts.finish

        def kept(*what: Any) -> bool:
            stays = keep(*what)
            own.store.attempts.give_back("box:0")
            own.states[first].own.lease_lost = True  # a beat says so
            return stays

        def late(*what: Any, **more: Any) -> Status | None:
            own.store.attempts.give_back("box:0")
            return finish(*what, **more)

        if "stored" in meanwhile:
            monkeypatch.setattr(own.hosts, "keep", kept)
        else:
            monkeypatch.setattr(own.store.attempts, "finish", late)
        own.end(first)
        assert place.store.attempts.of_job(first)[0].reason is Reason.WORKER_LOST
        assert place.store.hosts.send_off(own.rows[0], "box:0"), "no job is in it any more"


def test_a_trainer_that_is_killed_gives_all_its_jobs_back_and_spends_no_retry(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        second = own.start(joins=True)
        os.kill(own.pid(first), signal.SIGKILL)
        own.join(first, second)
        for job in (place.store.jobs.get(first), place.store.jobs.get(second)):
            assert (job.status, job.reason, job.retries_used, job.attempt) == (
                Status.QUEUED, Reason.HOST_LOST, 0, 1
            )  # fmt: skip
            assert "it shared its trainer with another job" in str(job.message)
        until(lambda: own.rows == [])


def test_a_drained_card_stops_all_its_members(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        second = own.start(joins=True)
        place.drain.ask("checkpoint")
        own.join(first, second)
        assert {place.store.jobs.get(n).reason for n in (first, second)} == {Reason.DRAINED}


def test_a_member_that_does_not_leave_ends_the_others_only_where_none_takes_a_step(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVE_S", 1.5)
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        deaf = own.start("deaf", joins=True)
        place.store.jobs.cancel(deaf, "ada")
        until(lambda: own.states[deaf].own.kill_at is not None)
        own.states[deaf].own.kill_at = 0.0
        own.threads[deaf].join(timeout=2)
        assert own.threads[deaf].is_alive() and own.threads[first].is_alive(), "the other one takes steps"
        frozen = time.monotonic()
        os.kill(own.pid(first), signal.SIGSTOP)
        assert place.store.jobs.get(deaf).status is Status.CANCELLED, "its row does not wait for that"
        assert [one.job_id for one in own.card.leavers] == [deaf], "what it holds stays held"
        own.join(first, deaf)
        assert time.monotonic() - frozen > 1.2, "neither is killed before"
        assert place.store.jobs.get(deaf).status is Status.CANCELLED
        assert place.store.jobs.get(first).reason is Reason.HOST_LOST
        until(lambda: own.rows == [] and not own.card.leavers)


def test_a_cancelled_member_s_row_closes_at_once_and_it_holds_its_part_until_it_has_left(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        deaf = own.start("deaf", joins=True)
        place.store.jobs.cancel(deaf, "ada")
        until(lambda: place.store.jobs.get(deaf).status is Status.CANCELLED, seconds=5)
        assert own.threads[deaf].is_alive() and place.store.attempts.of_job(deaf)[0].reason is Reason.CANCELLED
        (leaver,) = own.card.leavers
        assert leaver.job_id == deaf and leaver.bytes == GIB - 2**20, "the base is the host's"
        end_strays(own.place)
        link = own.states[first].run.trainer
        with (place.settings.home / "other.txt").open("w") as file:
            assert link is not None and link.trainer.join(deaf, file, LogBook()) is None, "it is not in there twice"
        own.end(first)
        (own.states[deaf].folder / "end").touch()
        own.join(deaf)
        assert (place.store.jobs.get(deaf).status, own.card.leavers) == (Status.CANCELLED, [])
        assert len(own.card.waiting_bases) == 1 and psutil.pid_exists(own.pid(deaf)), "the base waits for a job"


def test_a_job_whose_earlier_attempt_is_still_in_the_trainer_goes_back_at_once_and_says_so(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        deaf = own.start("deaf", joins=True)
        place.store.jobs.cancel(deaf, "ada")
        until(lambda: place.store.jobs.get(deaf).status is Status.CANCELLED)
        earlier, thread = own.states[deaf], own.threads[deaf]
        place.store.jobs.retry(deaf, "ada")
        claim = place.store.attempts.claim("box:0", joins=True)
        assert isinstance(claim, Claim) and not claim.joins
        own.follow(replace(claim, joins=True, host=own.rows[0]))  # as of a claim that did not know it
        own.join(deaf)
        back = place.store.jobs.get(deaf)
        assert (back.status, back.reason, back.retries_used) == (Status.QUEUED, Reason.HOST_LOST, 0)
        assert back.message == "its earlier attempt has not left the trainer that it was about to join"
        assert thread.is_alive() and own.threads[first].is_alive()
        own.end(first)
        earlier.own.kill_at = 0.0  # it is the last one there
        thread.join(timeout=40)
        assert not thread.is_alive()


def test_a_member_that_hangs_past_its_time_is_ended_in_its_row_and_others_go_on(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        deaf = own.start("deaf", joins=True)
        own.states[deaf].wishes.card_drained = "box:1 is being drained"
        until(lambda: own.states[deaf].own.kill_at is not None)
        assert place.store.jobs.get(deaf).status is Status.RUNNING, "it has time for a checkpoint"
        own.states[deaf].own.kill_at = 0.0
        until(lambda: place.store.jobs.get(deaf).status is Status.QUEUED)
        assert place.store.jobs.get(deaf).reason is Reason.DRAINED and own.threads[deaf].is_alive()
        own.end(deaf)
        assert own.threads[first].is_alive() and not own.card.leavers
        own.end(first)


def test_a_member_that_says_nothing_for_long_ends_alone(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        silent = own.start("silent", joins=True)
        monkeypatch.setattr(stops, "SILENCE_S", 1.5)
        own.join(silent)
        assert place.store.jobs.get(silent).reason is Reason.TRAINER_ERROR
        assert own.threads[first].is_alive()
        own.end(first)


def test_a_spoilt_trainer_takes_no_more_jobs_and_ends_with_its_last(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        second = own.start("spoils", joins=True)
        own.end(second)
        (row,) = place.store.hosts.of_card("box:0")
        assert row.spoilt == f"job {second} left something there"
        place.store.jobs.submit(submission(base_model="org/a", labels={"does": "steps"}, lora=1, method="lora"))
        place.store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB, max_jobs=4))
        claim = place.store.attempts.claim("box:0", joins=True)
        assert isinstance(claim, Claim) and not claim.joins
        own.follow(replace(claim, joins=True, host=row.host))  # as of a claim just before that
        own.join(claim.job_id)
        back = place.store.jobs.get(claim.job_id)
        assert (back.status, back.reason, back.retries_used) == (Status.QUEUED, Reason.HOST_LOST, 0)
        assert "takes no more jobs" in str(back.message) and own.threads[first].is_alive()
        own.end(first)
        until(lambda: own.rows == [])
        assert not psutil.pid_exists(own.pid(first))


def test_who_runs_out_of_memory_beside_others_goes_on_alone_with_less(place: Workplace) -> None:
    with crowd(place) as own:
        first = own.start()
        until(lambda: own.rows)
        second = own.start("grows", joins=True)
        own.end(second)
        job = place.store.jobs.get(second)
        assert (job.status, job.reason) == (Status.QUEUED, Reason.HOST_LOST)
        assert Adjustment(**(job.adjustment or {})) != Adjustment() and "continues alone" in str(job.message)
        assert own.threads[first].is_alive()
        own.end(first)


class Broken(AttemptVerbs):
    """Raises what no one expects for one job's beats."""

    failing: int | None = None
    failed = threading.Event()

    def beat(self, claim: Claim, progress: Progress) -> Beat:
        if claim.job_id == self.failing:
            self.failed.set()
            raise RuntimeError("a fault of ours")
        return super().beat(claim, progress)


def test_a_trainer_ends_though_the_others_left_while_its_last_member_was_leaving(place: Workplace) -> None:
    """Who was among others when it began to leave is the last when it is out."""
    store = Store(connect(place.settings))
    store.attempts = broken = Broken(store.begin)
    with crowd(replace(place, store=store)) as own:
        first = own.start()
        until(lambda: own.rows)
        last = own.start("deaf", joins=True)
        pid, link, broken.failing = own.pid(first), own.states[last].run.trainer, last
        assert link is not None
        assert broken.failed.wait(60)
        time.sleep(0.5)  # its supervisor begins to wait until the job has left, of which nothing tells
        own.end(first)
        assert link.trainer.count == 1 and psutil.pid_exists(pid)
        (own.states[last].folder / "end").touch()
        own.join(last)
        assert link.trainer.over and not psutil.pid_exists(pid)
        until(lambda: own.rows == [])


def test_a_job_that_comes_when_the_trainer_has_gone_goes_back_free_of_charge(place: Workplace) -> None:
    with crowd(place) as own:
        place.store.jobs.submit(submission(base_model="org/a", labels={"does": "steps"}, lora=1, method="lora"))
        claim = place.store.attempts.claim("box:0")
        assert isinstance(claim, Claim)
        own.follow(replace(claim, joins=True, host="0123456789abcdef"))
        own.join(claim.job_id)
        job = place.store.jobs.get(claim.job_id)
        assert (job.status, job.reason, job.retries_used) == (Status.QUEUED, Reason.HOST_LOST, 0)
        assert run_mark(claim.token) not in own.marks_of_processes()
