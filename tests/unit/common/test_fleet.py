"""The waiting lines in the database give what the same jobs in a list give."""

from __future__ import annotations

import datetime as dt
import random

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from loractl.common.fleet import read_levels, read_oldest
from loractl.common.policy import (
    OLDEST_FIRST_AFTER_S,
    RESERVE_AFTER_S,
    Card,
    Line,
    ListedLine,
    Openings,
    Waiting,
    levels_of,
    place,
)
from loractl.common.store import Store
from loractl.common.tables import Job
from loractl.common.units import GIB

from ..factories import submission

USERS = ("ada", "b|{", "çem")
ALL = Openings(gpu=90 * GIB, processor=(0, 0), unknown=True, labels=frozenset({frozenset({("room", "2")})}))
HOSTS = (frozenset(), frozenset({("room", "2")}))


def fill(store: Store, rng: random.Random, count: int, *, age_s: float = 0.0) -> list[Waiting]:
    """Random jobs, some of them on hold; those that may start, by number."""
    for _ in range(count):
        size = rng.choice((None, 1, 5, 5.5, 6, 11, 12, 30, 31, 32, 70))
        labels = dict(rng.choice(HOSTS))
        store.submit(
            submission(
                lora=size,
                qlora=size and rng.choice((size, size / 2)),
                user=rng.choice(USERS),
                priority=rng.choice((0, 0, 3, -5)),
                resources={"node_labels": labels},
                **rng.choice(({}, {"method": "qlora"})),
            )
        )
    with Session(store._engine) as session, session.begin():
        session.execute(update(Job).where(Job.job_id % 5 == 0).values(held=True))
        session.execute(update(Job).values(submitted_at=store.now() - dt.timedelta(seconds=age_s)))
    return store.ready(1000)


@pytest.mark.parametrize("seed", range(4))
def test_a_stored_line_gives_the_jobs_of_a_listed_one_while_openings_shrink(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    jobs = fill(store, rng, 60)
    for _ in range(15):
        drawn = shrinking(rng)
        with Session(store._engine) as session:
            levels, plain = list(read_levels(session, store.now())), list(levels_of(jobs))
            assert [set(level) for level in levels] == [set(level) for level in plain]
            for level, listed in zip(levels, plain, strict=True):
                assert {user: drain(line, drawn) for user, line in level.items()} == {
                    user: drain(line, drawn) for user, line in listed.items()
                }


@pytest.mark.parametrize("age_s", [0.0, RESERVE_AFTER_S, OLDEST_FIRST_AFTER_S])
def test_the_rule_decides_the_same_from_the_database_as_from_a_list(store: Store, age_s: float) -> None:
    rng = random.Random(int(age_s))
    jobs = fill(store, rng, 40, age_s=age_s + 60)
    for _ in range(30):
        cards = [
            Card(
                node=f"box:{n}",
                total=rng.choice((8, 24, 48, 80)) * GIB,
                outside=rng.choice((0, 0, 7)) * GIB,
                max_jobs=rng.choice((1, 4)),
                labels=rng.choice(HOSTS),
                processor=rng.random() < 0.2,
            )
            for n in range(rng.randint(1, 4))
        ]
        charges = {user: rng.choice((0.0, 9.0)) for user in USERS}
        by_age = ListedLine(sorted(jobs, key=lambda job: job.job_id))
        with Session(store._engine) as session:
            now = store.now()
            stored = list(place(read_levels(session, now), cards, charges, now, read_oldest(session, now)))
        assert stored == list(place(levels_of(jobs), cards, charges, now, by_age))


def test_the_line_by_age_holds_only_jobs_that_have_waited_a_day(store: Store) -> None:
    fill(store, random.Random(1), 3)
    with Session(store._engine) as session:
        assert read_oldest(session, store.now()).next(ALL) is None
        first = read_oldest(session, store.now() + dt.timedelta(seconds=OLDEST_FIRST_AFTER_S + 60)).next(ALL)
    assert first is not None
    assert first.job_id == 1


def shrinking(rng: random.Random) -> list[Openings]:
    """Openings, each within the last."""
    gpu, high, unknown, labels, drawn = 80 * GIB, 90 * GIB, True, frozenset(HOSTS), []
    for _ in range(rng.choice((1, 3, 12))):
        gpu, high = rng.randint(gpu // 2, gpu), rng.randint(60 * GIB, high)
        unknown = unknown and rng.random() < 0.8
        labels = labels - {HOSTS[1]} if rng.random() < 0.2 else labels
        drawn.append(Openings(gpu=min(gpu, 60 * GIB), processor=(60 * GIB, high), unknown=unknown, labels=labels))
    return drawn


def drain(line: Line, drawn: list[Openings]) -> list[Waiting]:
    """What a line gives: three jobs under each of the openings, and all the rest under the last."""
    given = [job for openings in drawn for _ in range(3) if (job := line.next(openings)) is not None]
    while (job := line.next(drawn[-1])) is not None:
        given.append(job)
    return given
