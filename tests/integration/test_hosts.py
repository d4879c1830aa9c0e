"""Trainers that stay with their base, on real processes: joined, killed, frozen, sent off, left by their node."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy.exc import OperationalError

from loractl.common.job.status import Reason, Status
from loractl.common.store.database import connect
from loractl.common.store.records import Claim, NewHost
from loractl.common.store.store import Store
from loractl.common.store.verbs import CardVerbs, HostVerbs
from loractl.common.units import GIB
from loractl.worker.attempt.attempt import begin
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import CARD_VARIABLE, Watch, card_mark, run_mark, runs_of
from loractl.worker.node import hosts as module
from loractl.worker.node.health.leftovers import end_all, end_strays
from loractl.worker.node.hosts import Hosts

from ..unit.factories import node_state, submission
from ..waiting import is_alive

QUICK = """
import os, sys, time
from loractl.common.job.status import Reason, Stage
from loractl.worker.protocol.messages import Ended, StageChanged, Stepped, Stop
from loractl.worker.recipe.trainer import main

served = 0

def run(order, orders, tell):
    global served
    served += 1
    does = order.spec.labels.get("does", "ends")
    sys.stderr.write(f"job {order.job_id} is number {served}\\n")
    tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
    reason, message = Reason.BAD_DATA, f"{os.getpid()} {os.environ['LORACTL_JOB']} {served}"
    if does == "waits":
        tell(Stepped(job_id=order.job_id, step=1, total_steps=2))
        while not isinstance(orders.get(), Stop):
            pass
        reason = Reason.CANCELLED
    if does == "dies":
        os._exit(3)
    return Ended(job_id=order.job_id, reason=reason, message=message, base_bytes=None if does == "goes" else 2**20)

if __name__ == "__main__":
    sys.exit(main(run))
"""


@pytest.fixture
def place(quick_place: Callable[[str], Workplace]) -> Workplace:
    """Its trainers do what QUICK says, and may stay."""
    place = quick_place(QUICK)
    place.store.cards.see(_state())
    return place


def _state() -> Any:
    return node_state("box:0", kind="cpu", total=24 * GIB, max_jobs=2)


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loractl.worker")


class Lab:
    """A node's hosts, and its jobs one after the other."""

    def __init__(self, place: Workplace, keep_s: float = 60.0) -> None:
        self.watch = Watch(device=place.device, node_pid=os.getpid())
        self.hosts = Hosts(place=place, watch=self.watch, keep_s=keep_s)
        self.place = replace(place, hosts=self.hosts)
        self.store = place.store

    def claim(self, does: str = "ends", base: str = "org/a", **keys: Any) -> Claim:
        self.store.jobs.submit(submission(base_model=base, labels={"does": does}, lora=1, method="lora", **keys))
        claim = self.store.attempts.claim("box:0")
        assert isinstance(claim, Claim)
        self.hosts.let_go(claim.leaving)
        return claim

    def run(self, does: str = "ends", base: str = "org/a", **keys: Any) -> tuple[int, int]:
        """The process in which a job was, and the place of the job among those of this process."""
        claim = self.claim(does, base, **keys)
        supervise(self.place, begin(claim, self.place.settings.work_dir))
        job = self.store.jobs.get(claim.job_id)
        assert job.reason is Reason.BAD_DATA, job.message
        pid, name, served = str(job.message).split()
        assert name == str(job.job_id)
        return int(pid), int(served)

    def marks_of_processes(self) -> set[str]:
        return runs_of(card_mark(self.place.settings, "box:0"))

    @property
    def rows(self) -> list[str]:
        return [row.host for row in self.store.hosts.of_card("box:0")]


@contextmanager
def lab(place: Workplace, keep_s: float = 60.0) -> Iterator[Lab]:
    own = Lab(place, keep_s)
    own.hosts.start()
    try:
        yield own
    finally:
        own.hosts.stop()
    assert own.marks_of_processes() == set() and own.hosts.marks == frozenset() and own.rows == []


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_next_job_on_a_base_goes_on_in_its_process_and_the_host_is_no_stray(place: Workplace) -> None:
    with lab(place) as own:
        first, number = own.run()
        assert number == 1 and len(own.rows) == 1
        assert own.marks_of_processes() == own.hosts.marks == set(own.rows), "it has left the attempt's mark"
        held = own.watch.look().used
        assert set(held) == {f"host-{own.rows[0]}"} and held[f"host-{own.rows[0]}"] > 2**20, "its memory is ours"
        end_strays(own.place)
        assert own.run() == (first, 2)
        end_strays(own.place)
        assert own.run(user="bob") == (first, 3), "no code of one person runs in it"
        log = "".join(chunk.text for chunk in place.store.jobs.log(3))
        assert "job 3 is number 3" in log and "job 2" not in log and "taken" not in log


def test_a_host_for_another_base_has_ended_before_a_new_trainer_starts(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 1000.0)  # it is told, and need not look
    place.store.cards.see(replace(_state(), max_jobs=1))
    with lab(place) as own:
        first, _ = own.run()
        claim = own.claim(base="org/b")
        assert claim.leaving == tuple(own.rows) and claim.host is None
        supervise(own.place, begin(claim, place.settings.work_dir))
        assert not psutil.pid_exists(first)
        pid, _, served = str(place.store.jobs.get(claim.job_id).message).split()
        assert int(pid) != first and served == "1"
        until(lambda: len(own.rows) == 1)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_job_that_meets_a_dead_or_frozen_host_starts_at_once_in_a_new_process(
    place: Workplace, sent: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    place = replace(place, settings=replace(place.settings, lease_s=4))
    with lab(place) as own:
        first, _ = own.run()
        claim = own.claim()
        assert claim.host == own.rows[0]
        os.kill(first, sent)
        supervise(own.place, begin(claim, place.settings.work_dir))
        job = place.store.jobs.get(claim.job_id)
        pid, _, served = str(job.message).split()
        assert int(pid) != first and served == "1" and not psutil.pid_exists(first)
        assert (job.attempt, job.retries_used, job.lab_failures) == (1, 0, 0), "it cost the job nothing"
        until(lambda: claim.host not in own.rows)


def test_an_idle_host_that_is_killed_gives_its_room_back(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    with lab(place) as own:
        first, _ = own.run()
        os.kill(first, signal.SIGKILL)
        until(lambda: own.rows == [] and own.hosts.marks == frozenset())
        assert "it ended by itself (exit status -9)" in caplog.text
        assert own.run()[1] == 1


def test_a_job_that_dies_in_a_host_takes_it_along_and_leaves_no_row(place: Workplace) -> None:
    with lab(place) as own:
        own.run()
        claim = own.claim("dies")
        assert claim.host is not None
        supervise(own.place, begin(claim, place.settings.work_dir))
        job = place.store.jobs.get(claim.job_id)
        assert (job.status, job.retries_used) == (Status.QUEUED, 1), "as with any trainer that ends without a word"
        until(lambda: own.rows == [])
        assert own.marks_of_processes() == set()


def test_a_cancelled_job_leaves_its_host_warm(place: Workplace) -> None:
    place = replace(place, settings=replace(place.settings, lease_s=6))  # a beat a second
    with lab(place) as own:
        first, _ = own.run()
        claim = own.claim("waits")
        state = begin(claim, place.settings.work_dir)
        thread = threading.Thread(target=supervise, args=(own.place, state))
        thread.start()
        until(lambda: state.heard.step == 1)
        place.store.jobs.cancel(claim.job_id, "ada")
        thread.join(timeout=20)
        assert place.store.jobs.get(claim.job_id).status is Status.CANCELLED
        assert own.run() == (first, 3)


@pytest.mark.parametrize("keys", [{"resources": {"exclusive": True}}, {"does": "goes"}])
def test_a_job_of_its_own_and_one_that_left_something_end_their_process(place: Workplace, keys: dict[str, Any]) -> None:
    with lab(place) as own:
        pid, _ = own.run(**keys)
        assert not psutil.pid_exists(pid) and own.rows == []


class DeafHosts(HostVerbs):
    """The database takes what is asked, and its answer is lost."""

    def keep(self, claim: Claim, new: NewHost) -> bool:
        super().keep(claim, new)
        raise OperationalError("the answer was lost", None, ConnectionError())


class AwayOnce(CardVerbs):
    """The database is away at the first try."""

    lost = False

    def drain(self, *asked: Any, **more: Any) -> None:
        if not self.lost:
            self.lost = True
            raise OperationalError("the database is away", None, ConnectionError())
        super().drain(*asked, **more)


def test_a_row_whose_answer_was_lost_goes_with_the_trainer(place: Workplace) -> None:
    store = Store(connect(place.settings))
    store.hosts = DeafHosts(store.begin)
    with lab(replace(place, store=store)) as own:
        own.run()
        until(lambda: own.rows == [] and own.marks_of_processes() == set(), seconds=10)


def test_a_card_is_closed_for_a_base_that_does_not_go_though_the_database_was_away(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEFT_S", 0.1)
    with lab(place) as own:
        own.run()
        (mark,), look = own.rows, own.watch.look
        left = {f"host-{mark}": 2**30}
        monkeypatch.setattr(own.watch, "look", lambda: replace(look(), used=left))
        own.hosts.place = replace(own.place, store=(store := Store(connect(place.settings))))
        store.cards, store.hosts = AwayOnce(store.begin), DeafHosts(store.begin)
        own.hosts.closed = True
        until(lambda: "box:0" in own.store.cards.drains(), seconds=10)
        assert own.store.cards.drains()["box:0"].reason.startswith("a base left 1.0 GiB of memory behind")
        left.clear()
        until(lambda: own.rows == [])


class Unsure(Watch):
    """A watch that once can't look, as where a box has no more files to open."""

    left = 0

    def look(self) -> Any:
        if self.left:
            self.left -= 1
            raise RuntimeError("can't start new thread")
        return super().look()


def test_a_base_goes_though_what_nobody_expected_went_wrong_once(place: Workplace) -> None:
    with lab(place) as own:
        own.run()
        own.hosts.watch = unsure = Unsure(device=place.device, node_pid=os.getpid())
        unsure.left = 2
        own.hosts.closed = True
        until(lambda: own.rows == [] and unsure.left == 0, seconds=10)


def test_a_base_goes_after_its_time_and_at_once_when_the_worker_or_the_card_stops(place: Workplace) -> None:
    with lab(place, keep_s=0.5) as own:
        own.run()
        until(lambda: own.rows == [])
    with lab(place) as own:
        own.run()
        own.hosts.closed = True
        until(lambda: own.rows == [])
        own.hosts.closed = False
        pid, _ = own.run()
        place.drain.ask("checkpoint")
        until(lambda: own.rows == [] and not psutil.pid_exists(pid))


def test_other_people_s_programs_shorten_its_time(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    with lab(place) as own:
        assert own.hosts._patience_s == 60
        own.hosts.keep_s = 600
        own.hosts._strangers_at = time.monotonic()
        assert own.hosts._patience_s == module.SHARED_KEEP_S
        own.hosts._strangers_at -= own.watch.high_water_s
        assert own.hosts._patience_s == 600


def test_a_host_ends_with_its_node_and_the_next_node_ends_a_frozen_one(place: Workplace, tmp_path: Path) -> None:
    with lab(place) as own:
        first, _ = own.run()
        frozen = psutil.Process(first)
        os.kill(first, signal.SIGSTOP)  # it does not notice that its pipe closes
        assert frozen.environ()[CARD_VARIABLE] == card_mark(place.settings, "box:0")
        end_all(own.place)
        assert not is_alive(frozen)
        until(lambda: own.rows == [])


def test_the_mark_of_an_attempt_is_not_that_of_its_host(place: Workplace) -> None:
    with lab(place) as own:
        claim = own.claim()
        supervise(own.place, begin(claim, place.settings.work_dir))
        assert run_mark(claim.token) not in own.marks_of_processes()
