"""Packs on a replay's clock: what becomes of running ones, and what they cost beside processes that share a card."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.placement.cards import Card, Leaver, Occupant
from loractl.common.placement.clock import LEAVE_S, ReplayedBase, ReplayedJob, newcomers_of
from loractl.common.placement.pack_rule import DELAY, PackedJob, PassLaw
from loractl.common.placement.replay import PlacementRule, Replay, replay
from loractl.common.units import GIB

from .test_replay import START, a_card, a_job, at, based, ends, starts, warm_base


def member(job_id: int, tokens: int, left_s: float, **more: float) -> tuple[Occupant, PackedJob]:
    """A job that trains in the host `h` and would end so soon if nothing changed."""
    occupant = Occupant(job_id=job_id, user="bob", reserved=8 * GIB, ends=at(left_s), host="h")
    return occupant, PackedJob(job_id=job_id, tokens=tokens, left_seconds=left_s, promised_seconds=left_s, **more)


def with_pack(members: Sequence[tuple[Occupant, PackedJob]], fixed: float = 100) -> Card:
    """A card whose one trainer has these members."""
    law = PassLaw(fixed=fixed, token=1, member=0)
    host = warm_base(open=True, key="m lora", law=law, members=tuple(packed for _, packed in members))
    return replace(a_card(80, max_jobs=1, running=[one for one, _ in members]), hosts=(host,))


@given(st.integers(0, 2**32))
def test_running_members_are_known_by_their_numbers_in_whatever_order_they_are_read(seed: int) -> None:
    rng = random.Random(seed)
    members = [member(90 + n, rng.choice((8, 64, 512)), rng.choice((50, 400, 3000))) for n in range(rng.randint(1, 5))]
    jobs = [packed(a_job(n, rng.randint(0, 500), 9, 100), rng.choice((8, 64))) for n in range(1, 4)]
    card = with_pack(members)
    (host,) = card.hosts
    other = replace(host, members=tuple(rng.sample(host.members, len(members))))
    known, mixed = (
        replay(jobs, [replace(card, hosts=(base,))], START, PlacementRule(newcomers=newcomers_of(jobs)))
        for base in (host, other)
    )
    assert known.runs == mixed.runs


def test_members_that_have_ended_hold_their_bytes_for_a_moment_alone() -> None:
    (running,) = with_pack([member(90, 10, 500)]).running
    host = warm_base(open=False, leavers=(Leaver(job_id=80, bytes=70 * GIB),), members=())
    busy = replace(a_card(80, max_jobs=1, running=[running]), hosts=(host,))
    assert starts(replay([a_job(1, 0, 40, 10)], [busy], START)) == {1: 500}
    empty = replace(busy, running=())
    done = replay([a_job(1, 0, 40, 10)], [empty], START, keep_warm_s=600)
    assert starts(done) == {1: LEAVE_S}, "the base waits for a job, and goes for this one"


def test_a_spoilt_base_waits_for_no_job() -> None:
    def done(**more: Any) -> Replay:
        card = with_pack([member(90, 10, 50)])
        card = replace(card, hosts=(replace(card.hosts[0], **more),))
        return replay([based(a_job(1, 100, 9, 100))], [card], START, keep_warm_s=600)

    assert done().runs[1].warm and not done(spoilt="a fault").runs[1].warm


def test_what_was_promised_to_members_and_their_limits_bind_later_joins() -> None:
    jobs = [packed(a_job(1, 100, 9, 100))]

    def joined(**more: float) -> bool:
        card = with_pack([member(90, 10, 1000, **more)])
        done = replay(jobs, [card], START, PlacementRule(newcomers=newcomers_of(jobs)))
        return done.runs[1].joined

    assert joined()
    assert joined(limit_seconds=1200) and not joined(limit_seconds=1000), "120/110 of 900 s, from 100 s on"
    occupant, packed_ = member(90, 10, 1000)
    late = replace(packed_, promised_seconds=1000 / (1 + DELAY))
    done = replay(jobs, [with_pack([(occupant, late)])], START, PlacementRule(newcomers=newcomers_of(jobs)))
    assert not done.runs[1].joined, "earlier joins have taken what they may"


# --- beside processes that share a card ---


def packed(job: ReplayedJob, tokens: int = 10, law: PassLaw | None = None) -> ReplayedJob:
    law = PassLaw(fixed=100, token=1, member=0) if law is None else law
    there = replace(based(job), base=ReplayedBase(bytes=5 * GIB, cold_s=0, warm_s=0, law=law))
    return replace(there, packed=PackedJob(tokens=tokens))


def both_ways(jobs: Sequence[ReplayedJob], card: Card) -> tuple[Replay, Replay]:
    """The jobs where they may join, and where each has a process of its own."""
    contention = card.contention or 0.0
    ours, apart = (
        replay(jobs, [card], START, PlacementRule(newcomers=asked), contention=contention)
        for asked in (newcomers_of(jobs), None)
    )
    return ours, apart


def mean_end(done: Replay) -> float:
    found = [end for end in ends(done).values() if end is not None]
    return sum(found) / len(found)


@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 400), st.floats(0, 30), st.integers(1, 500))
def test_jobs_of_one_size_end_no_later_than_as_processes_on_a_card_that_has_room_for_them(
    seed: int, contention: float, fixed: float, each: float, tokens: int
) -> None:
    rng = random.Random(seed)
    law = PassLaw(fixed=fixed, token=1, member=each)
    arrivals = sorted(rng.choice((0.0, rng.uniform(0, 500))) for _ in range(rng.randint(2, 6)))
    jobs = [
        packed(a_job(n, when, 10, rng.choice((1, 30, 200, 2000))), tokens, law)
        for n, when in enumerate(arrivals, start=1)
    ]
    ours, apart = both_ways(jobs, replace(a_card(80, max_jobs=6), contention=contention))
    later = ends(apart)
    for job_id, end in ends(ours).items():
        limit = later[job_id]
        assert end is not None and limit is not None and end <= limit * (1 + 1e-9) + 1e-6
