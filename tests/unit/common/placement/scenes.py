"""Cards, jobs and whole fleets to try the placement rule on."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need
from loractl.common.placement.cards import (
    Card,
    Occupant,
)
from loractl.common.placement.lines import Lines, Waiting
from loractl.common.placement.rule import Decision, place
from loractl.common.units import GIB

from ....conftest import examples

NOW = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)

AUTO = (Method.LORA, Method.QLORA)

LABELS = frozenset({("nvlink", "yes")})

sizes = st.integers(1, 400 * GIB)

many = settings(max_examples=examples(300))


def a_card(node: str = "a:0", gib: float = 24, **more: object) -> Card:
    return replace(Card(node=node, total=int(gib * GIB)), **more)  # type: ignore[arg-type]


def a_job(job_id: int, gib: float | None = 8, *, age_s: float = 0, **more: object) -> Waiting:
    size = None if gib is None else int(gib * GIB)
    base = Waiting(
        job_id=job_id,
        user="ada",
        priority=0,
        since=NOW - dt.timedelta(seconds=age_s),
        methods=(Method.LORA,),
        need=Need(lora=size, qlora=None),
    )
    return replace(base, **more)  # type: ignore[arg-type]


def running(job_id: int, gib: float, ends_in_s: float | None = None, user: str = "bob") -> Occupant:
    ends = None if ends_in_s is None else NOW + dt.timedelta(seconds=ends_in_s)
    return Occupant(job_id=job_id, user=user, reserved=int(gib * GIB), ends=ends)


def decide(
    jobs: Sequence[Waiting],
    cards: Sequence[Card],
    charges: dict[str, float] | None = None,
) -> tuple[Decision, ...]:
    return tuple(place(Lines(jobs), cards, charges or {}, NOW))


def started(decisions: Sequence[Decision]) -> dict[int, str]:
    return {d.placed.job.job_id: d.placed.node for d in decisions if d.placed is not None}


def order(decisions: Sequence[Decision]) -> list[int]:
    return [d.placed.job.job_id for d in decisions if d.placed is not None]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A fleet, what waits for it, and what its users have had. Drawn by a seed: one draw instead of a hundred."""

    jobs: list[Waiting]
    cards: list[Card]
    charges: dict[str, float]

    def decide(self) -> tuple[Decision, ...]:
        return decide(self.jobs, self.cards, self.charges)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    rng = random.Random(draw(st.integers(0, 2**32)))
    limit = rng.choice((None, None, None, 3, 1))
    ages = sorted(rng.choices((0, 60, 1800, 4000, 90_000), k=draw(st.integers(1, 10))), reverse=True)
    return Scene(
        jobs=[random_job(rng, number, age) for number, age in enumerate(ages, start=1)],
        cards=[random_card(rng, number, limit) for number in range(draw(st.integers(1, 4)))],
        charges={user: rng.choice((0.0, 5.0, 80.0)) for user in rng.sample("abc", 2)},
    )


def random_card(rng: random.Random, number: int, limit: int | None) -> Card:
    """One that is mostly open and partly taken."""
    return Card(
        node=f"{'nm'[number % 2]}:{number}",
        total=rng.choice((80, 80, 48, 24, 8)) * GIB,
        outside=rng.choice((0, 0, 0, 5, 30)) * GIB,
        margin=rng.choice((0, 1)) * GIB,
        running=tuple(
            Occupant(
                job_id=100 + 10 * number + n,
                user=rng.choice("abcd"),
                reserved=rng.randint(1, 30) * GIB,
                used=rng.choice((0, 0, 0, 20)) * GIB,
                ends=rng.choice((None, NOW + dt.timedelta(seconds=rng.randint(-100, 9000)))),
            )
            for n in range(rng.randint(0, 3))
        ),
        max_jobs=rng.choice((4, 4, 3, 2, 1, 0)),
        labels=rng.choice((frozenset(), LABELS)),
        open=rng.random() < 0.9,
        processor=rng.random() < 0.15,
        user_limit=limit,
        left_s=rng.choice((None, None, None, 600.0, 4000.0, 9000.0)),
        window_s=10_000.0,
        bf16=rng.choice((None, True, True, False)),
        contention=rng.choice((None, None, 0.0, 0.2, 1.0, 4.0)),
    )


def random_job(rng: random.Random, number: int, age_s: float) -> Waiting:
    need = rng.choice((None, 90, 79, 70, 60, 50, 40, 25, 20, 12, 6, 3, 1))
    smaller = rng.choice((None, need and need // 2 + 1))
    return Waiting(
        job_id=number,
        user=rng.choice("abc"),
        priority=rng.choice((0, 0, 1, -1)),
        since=NOW - dt.timedelta(seconds=age_s),
        left_s=rng.choice((3600.0, 3600.0, 60.0, 90_000.0)),
        methods=rng.choice((AUTO[:1], AUTO, AUTO[::-1])),
        need=Need(lora=need and need * GIB, qlora=smaller and smaller * GIB),
        requires=rng.choice((frozenset(), frozenset(), LABELS)),
        only_host=rng.choice((None, None, None, None, "n", "m")),
        avoids=rng.choice((frozenset(), frozenset(), frozenset({"n:0"}), frozenset({"n:0", "n:1"}), frozenset({"n"}))),
        checkpoint_s=rng.choice((None, 60.0, 900.0, 5000.0)),
        bf16=rng.choice((None, None, True, False)),
    )
