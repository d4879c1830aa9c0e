"""A job on two cards of a box whose nodes die, stand still or stop, or are wanted by a job of higher priority.

Real workers, with a rank for each card: the stand-in's, without torch, and where a test is long loractl's own.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.store.tables import Job
from loractl.worker.device.occupancy import CARD_VARIABLE, JOB_VARIABLE

from ..models import write_job
from .quick_lab import LEASE_S, Lab, family, freeze, nodes_of, until

CARDS = {"LORACTL_DEVICES": "sim:8GiB,8GiB"}
LASTING = ("--set=training.max_steps=100000", "--set=training.save_steps=5")
REPO = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Gangs:
    """A lab whose jobs are on two cards, with what trains them."""

    lab: Lab
    model: Path

    def submit(self, *options: str, cards: int = 2) -> int:
        file = write_job(self.lab.folder, self.model)
        on = ("--set=resources.parallel=sharded",) if cards > 1 else ()
        self.lab.cli("submit", file, f"--set=resources.cards={cards}", *on, *options)
        return max(job.job_id for job in self.lab.store.jobs.matching())

    def trains(self, job_id: int, attempt: int = 1, cards: int = 2) -> Job:
        """The job once this attempt has done some steps, with so many ranks."""
        job = self.lab.until(job_id, lambda job: job.attempt == attempt and (job.step or 0) > 12, seconds=120)
        assert len(self.ranks(job_id)) == cards
        return job

    def ranks(self, job_id: int, home: Path | None = None) -> list[psutil.Process]:
        """The processes of the job, of one box or of all of them."""
        found, homes = [], (home,) if home is not None else (self.lab.home, self.lab.folder)
        for process in psutil.process_iter():
            try:
                own = process.environ()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            here = own.get(CARD_VARIABLE, "").startswith(tuple(map(str, homes)))
            if here and own.get(JOB_VARIABLE) == str(job_id) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def freeze(self, processes: Callable[[], list[psutil.Process]]) -> None:
        freeze(processes, self.lab.home / "loractl.db")

    def node(self, index: int) -> psutil.Process:
        """The node of a card."""
        for node in nodes_of(self.lab.home):
            words = node.cmdline()
            if words[words.index("--index") + 1] == str(index):
                return node
        raise AssertionError("it has no such node")


OWN = pytest.mark.parametrize("gangs", ["own"], indirect=True)
"""For a test that is long in any case: loractl's own trainer shows what the stand-in would."""


@pytest.fixture(params=["stand-in", pytest.param("own", marks=pytest.mark.long)])
def gangs(request: pytest.FixtureRequest, lab: Lab, tiny_model: Path) -> Gangs:
    own = request.param == "own"
    trainer = "loractl.worker.recipe.trainer" if own else "tests.chaos.trainer"
    cli = lab.cli.with_environment(LORACTL_TRAINER=trainer, PYTHONPATH=str(REPO), OMP_NUM_THREADS="1")
    lab.cli = cli
    return Gangs(lab=lab, model=tiny_model)


@OWN
@pytest.mark.long
def test_a_job_on_two_cards_gives_way_on_both_and_resumes_on_one(gangs: Gangs) -> None:
    lab = gangs.lab
    lab.start(**CARDS)
    low = gangs.submit("--set=preemptible=true", *LASTING)
    gangs.trains(low)
    high = [gangs.submit("--set=priority=5", *LASTING, cards=1) for _ in range(2)]
    for job_id in high:
        lab.until(job_id, lambda job: job.status is Status.RUNNING and job.step, seconds=120)
    given = lab.store.attempts.of_job(low)[0]
    assert given.reason == Reason.PREEMPTED and "which has a higher priority" in (given.message or "")
    assert gangs.ranks(low) == []
    assert {lab.store.jobs.get(job_id).node for job_id in high} == {"heron:0", "heron:1"}
    lab.cli("cancel", high[0])
    lab.until(high[0], lambda job: job.status is Status.CANCELLED)
    assert lab.store.jobs.get(low).status is Status.QUEUED, "it waits for two cards"
    lab.cli("edit", low, "--set=resources.cards=1", "--set=resources.parallel=auto")
    gangs.trains(low, attempt=2, cards=1)
    assert (lab.store.attempts.of_job(low)[1].resumed_from_step or 0) >= (given.resumed_from_step or 0) + 5
    assert lab.store.jobs.get(low).retries_used == 0


@OWN
@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_box_s_job_goes_on_on_the_cards_of_another(gangs: Gangs, how: signal.Signals) -> None:
    lab = gangs.lab
    lost = lab.start(cold=True, **CARDS)
    job_id = gangs.submit(*LASTING)
    reached = gangs.trains(job_id).step or 0
    whole = [psutil.Process(lost.pid), *family(lost.pid)]
    began = time.monotonic()
    if how is signal.SIGSTOP:
        gangs.freeze(lambda: family(lost.pid))
    else:
        for process in whole:
            process.send_signal(how)
    lab.start_box("owl", **CARDS)
    lab.until(job_id, lambda job: job.attempt == 2 and job.status is Status.RUNNING)
    assert time.monotonic() - began < LEASE_S + 20, "noticed within the lease, and a worker's start"
    gangs.trains(job_id, attempt=2, cards=4 if how is signal.SIGSTOP else 2)
    first, second = lab.store.attempts.of_job(job_id)
    assert first.reason == Reason.WORKER_LOST and second.node.startswith("owl:")
    assert (second.resumed_from_step or 0) >= reached - 10, "at most one checkpoint interval is lost, and a step or two"
    for process in whole:
        if process.is_running():
            process.send_signal(signal.SIGCONT)
    until(lambda: len(gangs.ranks(job_id)) == 2)
    assert not gangs.ranks(job_id, lab.home)


@pytest.mark.parametrize(
    ("gangs", "how"),
    [
        ("stand-in", signal.SIGKILL),
        pytest.param("own", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("own", signal.SIGSTOP, marks=pytest.mark.long),
    ],
    indirect=["gangs"],
)
def test_the_second_card_s_node_alone_ends_all_ranks_and_the_job_goes_on(gangs: Gangs, how: signal.Signals) -> None:
    lab = gangs.lab
    lab.start(cold=how is signal.SIGSTOP, **CARDS)
    job_id = gangs.submit(*LASTING)
    first_card = gangs.trains(job_id).node or ""
    second = next(card for card in ("heron:0", "heron:1") if card != first_card)
    ranks = gangs.ranks(job_id)
    node = gangs.node(int(second[-1]))
    if how is signal.SIGSTOP:
        gangs.freeze(lambda: [node])
    else:
        node.kill()
    _, alive = psutil.wait_procs(ranks, timeout=LEASE_S + 15)
    assert not alive
    lost = lab.until(job_id, lambda job: job.attempt == 2 or job.status is Status.QUEUED)
    assert set(lost.avoids or {}) == {second}, "the card whose node was lost is blamed"
    if how is signal.SIGSTOP:
        node.resume()
    gangs.trains(job_id, attempt=2)
    first, again = lab.store.attempts.of_job(job_id)
    assert (first.reason, lost.retries_used) == (Reason.WORKER_LOST, 0)
    assert (first.message or "").startswith(second)
    assert again.resumed_from_step


def test_a_rank_that_is_killed_ends_the_attempt_and_the_next_goes_on(gangs: Gangs) -> None:
    gangs.lab.start(**CARDS)
    job_id = gangs.submit(*LASTING)
    gangs.trains(job_id)
    ranks = sorted(gangs.ranks(job_id), key=psutil.Process.create_time)
    ranks[1].kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    gangs.trains(job_id, attempt=2)
    first, second = gangs.lab.store.attempts.of_job(job_id)
    assert first.reason == Reason.KILLED and second.resumed_from_step


def test_no_rank_stays_on_a_card_while_the_node_that_started_it_stands_still(gangs: Gangs) -> None:
    """The other card's node lives and takes the next job: nothing may be left there."""
    lab = gangs.lab
    lab.start(cold=True, **CARDS)
    job_id = gangs.submit(*LASTING)
    node = gangs.trains(job_id).node or ""
    leader = gangs.node(int(node[-1]))
    gangs.freeze(lambda: [leader])
    lost = lab.until(job_id, lambda job: job.status is Status.QUEUED, seconds=LEASE_S + 20)
    until(lambda: not gangs.ranks(job_id), seconds=20)
    assert set(lost.avoids or {}) == {node}
    leader.resume()
    gangs.trains(job_id, attempt=2)
    assert lab.store.attempts.of_job(job_id)[0].reason == Reason.WORKER_LOST
