"""The pack rule: properties of the law of passes, and which joins pay."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loractl.common.placement.pack_rule import DELAY, MeasuredPass, PackedJob, PassLaw, join_verdict

TOKENS = st.integers(1, 16_384)
PACKS = st.lists(TOKENS, min_size=1, max_size=8)


def measured(law: PassLaw, tokens: list[int]) -> MeasuredPass:
    return MeasuredPass(tokens=sum(tokens), members=len(tokens), seconds=law.seconds(sum(tokens), len(tokens)))


@given(PACKS, st.booleans())
def test_a_pack_is_as_fast_as_its_members_at_least_and_as_many_times_at_most(tokens: list[int], nf4: bool) -> None:
    law = PassLaw.start(quantised=nf4)
    assert 1 - 1e-9 <= law.speed_up(tokens) <= len(tokens) + 1e-9
    assert law.speed_up(tokens) == pytest.approx(law.speed_up(tokens[::-1]))


@given(PACKS, TOKENS, st.integers(1, 1000), st.booleans())
def test_longer_rows_gain_less(tokens: list[int], one: int, more: int, nf4: bool) -> None:
    law = PassLaw.start(quantised=nf4)
    equal = [one] * (len(tokens) + 1)
    assert law.speed_up([count + more for count in equal]) <= law.speed_up(equal) + 1e-9


@settings(max_examples=20)
@given(fixed=st.floats(0, 500), member=st.floats(0, 50), scale=st.floats(1e-6, 1e3), nf4=st.booleans())
def test_the_law_comes_to_tell_what_was_measured(fixed: float, member: float, scale: float, nf4: bool) -> None:
    true = PassLaw(fixed=fixed * scale, token=scale, member=member * scale)
    shapes = [[64], [64] * 4, [256], [128, 64], [512] * 2, [32] * 8]
    law = PassLaw.start(quantised=nf4)
    for shape in itertools.islice(itertools.cycle(shapes), 60):
        law = law.learn(measured(true, shape))
    assert min(law.fixed, law.token, law.member) >= 0
    for shape in shapes:
        assert law.seconds(sum(shape), len(shape)) == pytest.approx(true.seconds(sum(shape), len(shape)), rel=0.2)
        assert law.speed_up(shape) == pytest.approx(true.speed_up(shape), rel=0.2)


def test_the_first_figures_are_those_that_were_measured() -> None:
    lora, qlora = (PassLaw.start(quantised=nf4) for nf4 in (False, True))
    assert lora.speed_up([64] * 4) == pytest.approx(1.3, abs=0.05)
    assert lora.speed_up([512] * 4) == pytest.approx(1.0, abs=0.05)
    assert qlora.speed_up([64] * 8) == pytest.approx(1.5, abs=0.05)


def test_jobs_of_one_sweep_join_where_others_would_wait_longer() -> None:
    law = PassLaw.start(quantised=False)
    sweep = [PackedJob(tokens=64, sweep="s")] * 3
    assert join_verdict(law, sweep, sweep[0]).pays
    others = [replace(job, sweep=None) for job in sweep]
    verdict = join_verdict(law, others, others[0])
    assert not verdict.pays and verdict.needed == pytest.approx(1.6)
    assert verdict.why == "4 jobs in one pass are 1.31 times as fast as one by one, less than 1.60"
    assert join_verdict(law, others, others[0], shared=True).pays, "processes that share a card gain nothing at all"
    mixed = [*sweep[:2], replace(sweep[0], sweep="another")]
    assert not join_verdict(law, mixed, sweep[0]).pays
    short = [PackedJob(tokens=8)] * 3
    assert join_verdict(law, short, short[0]).pays


@given(PACKS, TOKENS, st.integers(1, 10_000), st.floats(0.01, 1e6), st.sampled_from(["limit", "promise", "sweep"]))
def test_no_join_pushes_a_member_past_its_limit_or_its_promise(
    running: list[int], joining: int, passes: int, left: float, kind: str
) -> None:
    law = PassLaw.start(quantised=True)
    told = {"limit_seconds": left} if kind == "limit" else {"promised_seconds": left}
    sweep = None if kind == "promise" else "s"
    jobs = [PackedJob(tokens=count, sweep=sweep, passes=passes, **told) for count in running]
    verdict = join_verdict(law, jobs, PackedJob(tokens=joining, sweep=sweep))
    needed = passes * law.seconds(sum(running) + joining, len(running) + 1)
    in_time = kind == "sweep" or needed <= left * (1 + DELAY * (kind == "promise"))
    assert verdict.pays == (in_time and verdict.speed_up >= verdict.needed)


@given(TOKENS, TOKENS, st.floats(1, 1e6), st.floats(1, 1e6))
def test_a_member_s_measured_end_moves_as_its_passes_do(first: int, second: int, left: float, limit: float) -> None:
    law = PassLaw.start(quantised=False)
    member = PackedJob(tokens=first, sweep="s", left_seconds=left, limit_seconds=limit)
    verdict = join_verdict(law, [member], PackedJob(tokens=second, sweep="s"))
    assert verdict.pays == (left * law.seconds(first + second, 2) / law.seconds(first, 1) <= limit)


def test_a_law_comes_back_as_it_was_kept_and_tells_what_a_member_had() -> None:
    law = PassLaw.start(quantised=True)
    assert law.micro_batch is None and not law.is_measured
    for members in (1, 4, 2):
        law = law.learn(MeasuredPass(tokens=50 * members, members=members, seconds=0.2 * members))
    assert PassLaw.from_json(law.as_json(), quantised=True) == law
    assert law.is_measured and law.micro_batch == 50
