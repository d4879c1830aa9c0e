"""What `why` says of a waiting job against what then happens: its card, its moment, and who has to end first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from loractl.common.job.status import Reason
from loractl.common.placement.rule import RESERVE_AFTER_S
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.wait.reasons import Tier
from loractl.scheduler.why.answer import Why, why

from ...common.store.test_gangs import gang
from ...factories import RESULT, Clock, node_state, submission


class Lab:
    """Two cards of 24 GiB in one box. What runs ends when it was expected to, and then every card asks for a job."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store, self.clock = store, clock
        self.began = clock.now
        self.state: dict[str, Any] = {"total": 24 * GIB, "max_jobs": 1, "gangs": True}
        self.running: list[tuple[float, Claim]] = []  # seconds from the beginning, and who ends then
        self.started: dict[int, tuple[float, list[str]]] = {}  # when and where, by job
        self.cards = ("heron:0", "heron:1")

    @property
    def seconds(self) -> float:
        return (self.clock.now - self.began).total_seconds()

    def see(self, **more: Any) -> None:
        self.state.update(more)
        for node in self.cards:
            self.store.cards.see(node_state(node, **self.state))

    def queue(self, gib: float = 20, *, user: str = "ada", **keys: Any) -> int:
        return self.store.jobs.submit(submission(lora=gib, method="lora", user=user, **keys))

    def run(self, ends: float, gib: float = 20, *, node: str = "heron:0", user: str = "bob", **keys: Any) -> Claim:
        """A job on a card that says when it ends, as of now."""
        self.queue(gib, user=user, **keys)
        mine = self.store.attempts.claim(node, gangs=True)
        assert isinstance(mine, Claim)
        self.expect(mine, ends)
        return mine

    def expect(self, mine: Claim, ends: float) -> None:
        self.store.attempts.beat(mine, Progress(step=1, total_steps=1000, eta_seconds=ends))
        self.running.append((self.seconds + ends, mine))

    def ask(self, job_id: int) -> Why:
        answer = why(self.store, job_id, in_other_forms=False)
        assert isinstance(answer, Why)
        return answer

    def claim_all(self) -> None:
        while claims := [one for node in self.cards if isinstance(one := self._claim(node), Claim)]:
            for mine in claims:
                nodes = [share.node for share in mine.shares] or [self.store.jobs.get(mine.job_id).node or ""]
                self.started[mine.job_id] = (self.seconds, sorted(nodes))

    def _claim(self, node: str) -> Any:
        return self.store.attempts.claim(node, gangs=True)

    def goes_on(self, job_id: int) -> None:
        """Every card asks, and again at each end, to the last. Whenever `why` says that the job is next, it starts."""
        self._moment(job_id)
        for ends, mine in sorted(self.running, key=lambda pair: pair[0]):
            self.forward(ends - self.seconds)
            self.store.attempts.finish(mine, Reason.OK, "done", Progress(), RESULT)
            self._moment(job_id)

    def _moment(self, job_id: int) -> None:
        self.see()
        if job_id not in self.started:
            asked = self.ask(job_id)
            self.claim_all()
            assert (asked.wait.tier is Tier.NEXT) == (job_id in self.started), f"{asked.wait} at {self.seconds}"

    def forward(self, seconds: float) -> None:
        self.clock.forward(seconds)
        self.see()
        for ends, mine in self.running:
            if ends > self.seconds:
                self.store.attempts.beat(mine, Progress(step=1, total_steps=1000, eta_seconds=ends - self.seconds))


@pytest.fixture
def lab(sqlite_template: Path, tmp_path: Path) -> Iterator[Lab]:
    copy(sqlite_template, tmp_path / "lab.db")
    clock, engine = Clock(), make_engine(f"sqlite:///{tmp_path / 'lab.db'}")
    made = Lab(Store(engine, clock), clock)
    made.see()
    yield made
    engine.dispose()


def alone(lab: Lab) -> int:
    """It waits for the card that is free first, behind one that goes before it."""
    lab.run(900)
    lab.run(300, node="heron:1", user="cyd")
    lab.queue(priority=1)
    return lab.queue()


def several(lab: Lab) -> int:
    """It waits for the second card, and the first stays busy longer."""
    lab.run(900)
    lab.run(300, node="heron:1", user="cyd")
    return lab.store.jobs.submit(gang())


def several_kept(lab: Lab) -> int:
    """Both cards are kept for it: a younger job on one does not pass it."""
    lab.run(RESERVE_AFTER_S + 900)
    lab.run(RESERVE_AFTER_S + 300, node="heron:1", user="cyd")
    mine = lab.store.jobs.submit(gang())
    lab.forward(RESERVE_AFTER_S + 1)
    lab.queue(4, user="eve")
    return mine


def several_at_once(lab: Lab) -> int:
    return lab.store.jobs.submit(gang())


def limited(lab: Lab) -> int:
    """A card is idle, and its user runs as many as may."""
    lab.see(user_limit=1)
    lab.run(500, user="ada")
    return lab.queue()


def limited_behind_another(lab: Lab) -> int:
    """Of two of its user's jobs the older one has the turn, and nobody knows for how long."""
    lab.see(user_limit=1)
    lab.run(500, user="ada")
    lab.queue()
    return lab.queue()


CASES: dict[Callable[[Lab], int], tuple[float | None, str]] = {
    alone: (900, "memory: heron:0 when job 1 ends"),
    several: (900, "memory: waits for 2 cards of 20.0 GiB on heron when jobs 2 and 1 end"),
    several_kept: (2700, "memory: waits for 2 cards of 20.0 GiB on heron when jobs 2 and 1 end"),
    several_at_once: (0, "next: heron:0 and heron:1 are about to take it"),
    limited: (500, "limit: ada runs 1 job, and one person may run 1 at a time"),
    limited_behind_another: (None, "limit: ada runs 1 job, and one person may run 1 at a time"),
}
"""When it starts, in seconds from the beginning (None: not while the job before it runs), and what it is told."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_job_starts_when_and_where_why_expects_it(case: Callable[[Lab], int], lab: Lab) -> None:
    mine = case(lab)
    answer, (expected, told) = lab.ask(mine), CASES[case]
    start = answer.start and ((answer.start.at - lab.began).total_seconds(), sorted(answer.start.nodes))
    assert str(answer.wait) == told and (start and start[0]) == expected
    lab.goes_on(mine)
    assert lab.started.get(mine) == start
