"""Claims, rounds, `why`, `status` and the replay say alike who starts where, and who yields to whom, on random labs."""

from __future__ import annotations

import random

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from loractl.common.job.status import Reason, Stage
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import CardContention, Job
from loractl.common.units import GIB
from loractl.scheduler.wait.queue import waiting_jobs
from loractl.scheduler.wait.reasons import Tier
from loractl.scheduler.why.answer import Why, why

from ....databases import SQLITE_ALONE
from ...factories import Clock, node_state, submission

ROUNDS = 8
LENGTHS_S = (60.0, 300.0, 3600.0, 20_000.0, 200_000.0)


class Lab:
    """Some cards, and jobs that train for as long as they were drawn."""

    def __init__(self, store: Store, clock: Clock, seed: int) -> None:
        self.store, self.clock, self.rng = store, clock, random.Random(seed)
        self.cards = {
            f"{'ab'[n % 2]}:{n}": (self.rng.choice((12, 24, 48, 80)) * GIB, self.rng.choice((1, 1, 2, 4)))
            for n in range(self.rng.randint(1, 5))
        }
        self.running: dict[int, Claim] = {}
        self.on: dict[int, str] = {}
        self.left: dict[int, float] = {}
        self.starts = self.stops = 0
        self.contention = random.Random(f"contention {seed}").choice((None, 0.1, 1.0, 3.0))
        if self.contention is not None:
            with Session(store.engine) as session, session.begin():
                session.add(CardContention(device_name="NVIDIA A40", contention=self.contention))

    def beat(self) -> None:
        for node, (total, most) in self.cards.items():
            self.store.cards.see(node_state(node, total=total, max_jobs=most))
        for number, claim in self.running.items():
            told = Progress(stage=Stage.TRAINING, eta_seconds=self.left[number], prepared_s=8.0, step=5)
            self.store.attempts.beat(claim, told)

    def submit(self) -> None:
        keys = {"preemptible": False} if self.rng.random() < 0.1 else {}
        size, user = self.rng.choice((5, 9, 11, 20, 23, 40, 70)), self.rng.choice(("ada", "bob", "cyd"))
        number = self.store.jobs.submit(submission(lora=size, method="lora", user=user, **keys))
        self.left[number] = self.rng.choice(LENGTHS_S)
        with Session(self.store.engine) as session, session.begin():
            session.execute(update(Job).where(Job.job_id == number).values(work_left_s=self.left[number]))

    def claim(self) -> dict[int, str]:
        """Cards claim in any order until none gets a job, each what the rule gives it at that moment."""
        found = dict[int, str]()
        while given := self.store.cards.fleet().placed:
            number = self.rng.choice(list(given))
            node = given[number].node
            first = next(job for job, placed in given.items() if placed.node == node)
            taken = self.store.attempts.claim(node)
            assert isinstance(taken, Claim) and taken.job_id == first
            assert first not in self.running, "it runs already"
            self.running[first], self.on[first], found[first] = taken, node, node
        assert not any(isinstance(self.store.attempts.claim(node), Claim) for node in self.cards)
        return found

    def pass_time(self) -> None:
        """To the next end, or a part of the way."""
        least = min((self.left[number] for number in self.running), default=600.0)
        seconds = max(1.0, min(least, self.rng.choice((60.0, 700.0, 3000.0))))
        self.clock.forward(seconds)
        for number in list(self.running):
            self.left[number] -= seconds
            if self.left[number] <= 0:
                self.store.attempts.finish(self.running.pop(number), Reason.CANCELLED, "over", Progress())

    def check_starts(self) -> None:
        """What the rule decides of all is what each says, and what claims then do."""
        view = self.store.cards.fleet()
        given = {number: placed.node for number, placed in view.placed.items()}
        rows = [job for number in self.left if (job := self.store.jobs.get(number)).status.value == "queued"]
        waits = waiting_jobs(self.store, rows, view)
        for job in rows:
            number, said = job.job_id, waits.reasons[job.job_id]
            assert (said.tier is Tier.NEXT) == (number in given), said
            assert (said.word == "alone") == (number in view.declined), said
            asked = why(self.store, number, in_other_forms=False)
            assert isinstance(asked, Why) and str(asked.wait) == str(said)
            if number in view.declined:
                known = "50% longer (assumed)"
                if self.contention is not None:
                    known = f"{self.contention:.0%} longer (measured)"
                assert any(known in fit.then for fit in asked.cards)
            if number in given:
                assert given[number] in said.sentence
                if view.running:
                    start = waits.starts[number]
                    assert (start.at, start.nodes) == (view.now, (given[number],)), "the replay"
        self.claim()
        self.starts += len(given)
        for node, (total, most) in self.cards.items():
            held = [self.store.jobs.get(number) for number in self.running if self.on[number] == node]
            assert len(held) <= most and sum(job.vram_reserved or 0 for job in held) <= total, "promised twice"

    def check_stops(self) -> None:
        """Whom all say that a round will ask to stop, and for whom, is whom it asks; the short job gets that card."""
        view = self.store.cards.fleet()
        on = [(card.node, one) for card in view.cards.values() for one in card.running]
        expected = {one.job_id: (one.gives_way_to, node) for node, one in on if one.gives_way_to is not None}
        for going, (short, node) in expected.items():
            asked = why(self.store, short or 0, in_other_forms=False)
            assert isinstance(asked, Why) and any(node == fit.node and str(going) in fit.then for fit in asked.cards)
            assert asked.start is not None and asked.start.nodes == (node,), "the replay"
        assert set(self.store.cards.preempt()) == expected.keys()
        for going, (short, _) in expected.items():
            assert self.store.jobs.get(going).preempted_by == short
            self.store.attempts.finish(self.running.pop(going), Reason.PREEMPTED, "gave way", Progress(step=6))
        given = self.claim()
        for short, node in expected.values():
            assert given.get(short or 0) == node, "it starts where the others stopped"
        self.stops += len(expected)


@SQLITE_ALONE
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3, 4)), 37])
def test_claims_rounds_why_status_and_the_replay_agree_on_random_labs(store: Store, clock: Clock, seed: int) -> None:
    lab = Lab(Store(store.engine, clock), clock, seed)
    for _ in range(ROUNDS):
        for _ in range(lab.rng.randint(1, 5)):
            lab.submit()
        lab.beat()
        lab.check_starts()
        lab.beat()
        lab.check_stops()
        lab.pass_time()
    assert lab.starts
