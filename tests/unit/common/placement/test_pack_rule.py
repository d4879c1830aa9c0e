"""The pack rule: properties of the law of passes, and which joins pay."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loractl.common.placement.pack_rule import (
    DELAY,
    LEAST_GAIN,
    MeasuredPass,
    PackedJob,
    PassLaw,
    Sharing,
    join_verdict,
)

from ....conftest import examples

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


@settings(max_examples=examples(20))
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


@pytest.mark.parametrize("load", [1.5, 0.7])
@pytest.mark.parametrize("fixed", [30.0, 300.0])
def test_another_load_of_the_machine_is_no_property_of_the_pass(fixed: float, load: float) -> None:
    rng, true = random.Random(0), PassLaw(fixed=fixed, token=1, member=2)

    def learned(law: PassLaw, members: int, passes: int, slower: float) -> PassLaw:
        for _ in range(passes):
            one = measured(true, [rng.randint(48, 80) for _ in range(members)])
            law = law.learn(replace(one, seconds=one.seconds * slower * rng.gauss(1, 0.03)))
        return law

    law = learned(learned(PassLaw.start(quantised=True), 1, 20, 1.0), 2, 10, 1.0)
    assert law.speed_up([64] * 4) == pytest.approx(true.speed_up([64] * 4), rel=0.1)
    law = learned(learned(law, 2, 20, load), 4, 10, load)
    assert law.speed_up([64] * 4) == pytest.approx(true.speed_up([64] * 4), rel=0.15)


@pytest.mark.parametrize("fixed", [300.0, 3000.0, 30_000.0])
def test_a_fixed_part_that_is_many_times_the_first_figure_is_found_by_the_first_pass_of_two(fixed: float) -> None:
    true, law = PassLaw(fixed=fixed, token=1, member=2), PassLaw.start(quantised=True)
    for tokens in ([300], [1000], [500], [700], [800, 600]):
        law = law.learn(measured(true, tokens))
    assert law.speed_up([512] * 4) == pytest.approx(true.speed_up([512] * 4), rel=0.05)


def test_the_first_figures_are_those_that_were_measured() -> None:
    lora, qlora = (PassLaw.start(quantised=nf4) for nf4 in (False, True))
    assert lora.speed_up([64] * 4) == pytest.approx(1.3, abs=0.05)
    assert lora.speed_up([512] * 4) == pytest.approx(1.0, abs=0.05)
    assert qlora.speed_up([64] * 4) == pytest.approx(1.48, abs=0.05)
    assert qlora.speed_up([64] * 8) == pytest.approx(1.6, abs=0.05)


def test_a_sweep_s_jobs_of_512_tokens_are_left_alone_where_they_were_measured_to_lose() -> None:
    law = PassLaw.start(quantised=False)
    long, short = PackedJob(tokens=512, sweep="s"), PackedJob(tokens=64, sweep="s")
    for others in (1, 2, 3):
        assert not join_verdict(law, [long] * others, long).pays
        assert join_verdict(law, [short] * others, short).pays


def test_jobs_of_one_sweep_join_where_others_would_wait_longer() -> None:
    law = PassLaw.start(quantised=False)
    sweep = [PackedJob(tokens=64, sweep="s")] * 3
    assert join_verdict(law, sweep, sweep[0]).pays
    others = [replace(job, sweep=None) for job in sweep]
    verdict = join_verdict(law, others, others[0])
    assert not verdict.pays and verdict.needed == pytest.approx(1.6)
    assert verdict.why == "4 jobs in one pass are 1.31 times as fast as one by one, less than 1.60"
    turns, half = Sharing(contention=1.0), Sharing(contention=0.5)
    assert join_verdict(law, others, others[0], apart=turns).pays, "processes that take turns gain nothing at all"
    refused = join_verdict(law, others, others[0], apart=half)
    assert not refused.pays and refused.needed == pytest.approx(1.6)
    assert join_verdict(law, sweep, sweep[0], apart=half).pays, "what a process costs is assumed, a sweep's gain is not"
    slower = "a member of one pass would slow another by 69 %"
    assert refused.why == f"{slower}, a separate process on the card by 50 %"
    assert not join_verdict(law, others, others[0], apart=replace(turns, others=2)).pays, "two more share the card"
    mixed = [*sweep[:2], replace(sweep[0], sweep="another")]
    assert not join_verdict(law, mixed, sweep[0]).pays
    short = [PackedJob(tokens=8)] * 3
    assert join_verdict(law, short, short[0]).pays


@given(PACKS, TOKENS, st.floats(0, 1), st.integers(0, 3), st.floats(0, 500), st.floats(0, 50))
def test_beside_processes_no_member_of_a_joined_pack_or_of_a_part_of_it_is_slower_than_as_one_of_them(
    running: list[int], joining: int, contention: float, others: int, fixed: float, each: float
) -> None:
    law, apart = PassLaw(fixed=fixed, token=1, member=each), Sharing(contention=contention, others=others)
    jobs = [PackedJob(tokens=count) for count in running]
    verdict = join_verdict(law, jobs, PackedJob(tokens=joining), apart=apart)
    every = [*running, joining]

    def slower(own: int, pack: list[int]) -> tuple[float, float]:
        """How many times as long a member takes in the pack, and as one of as many processes."""
        beside = len(pack) - 1
        in_pack = law.seconds(sum(pack), len(pack)) / law.seconds(own, 1) * (1 + contention * others)
        return in_pack, 1 + contention * (others + beside)

    packs = [every, *([every[n], every[m]] for n, m in itertools.combinations(range(len(every)), 2))]
    paces = [slower(own, pack) for pack in packs for own in pack]
    if verdict.pays:
        assert all(ours <= theirs * (1 + 1e-9) for ours, theirs in paces)
        assert verdict.speed_up >= verdict.needed - 1e-9 >= 1 - 1e-9
    else:
        assert any(ours > theirs for ours, theirs in paces)


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
    in_time = left * law.seconds(first + second, 2) / law.seconds(first, 1) <= limit
    assert verdict.pays == (in_time and verdict.speed_up >= verdict.needed == LEAST_GAIN)


@pytest.mark.parametrize("load", [1.0, 3.0])
def test_a_newcomer_s_time_limit_is_about_the_clock_and_the_gain_is_not(load: float) -> None:
    """On a processor that others load a pass takes longer than its own computing."""
    law = PassLaw.start(quantised=True)
    for members in (1, 2, 4) * 4:
        own = 0.1 + 0.01 * members
        law = law.learn(MeasuredPass(tokens=64 * members, members=members, seconds=own, wall_seconds=own * load))
    running, limit = PackedJob(tokens=64, sweep="s"), 200 * law.seconds(128, 2)
    joining = PackedJob(tokens=64, sweep="s", passes=100, limit_seconds=limit)
    verdict = join_verdict(law, [running], joining)
    assert verdict.pays == (load < 2) and verdict.speed_up == law.speed_up([64, 64])
    kept = PassLaw.from_json(law.as_json(), quantised=True)
    assert kept == law and kept.load == pytest.approx(load)
    unloaded = PassLaw.from_json({**law.as_json(), "load": 1.0}, quantised=True)
    assert join_verdict(unloaded, [running], joining).pays


def test_a_law_comes_back_as_it_was_kept_and_tells_what_a_member_had() -> None:
    law = PassLaw.start(quantised=True)
    assert law.micro_batch is None and not law.is_measured
    for members in (1, 4, 2):
        law = law.learn(MeasuredPass(tokens=50 * members, members=members, seconds=0.2 * members))
    assert PassLaw.from_json(law.as_json(), quantised=True) == law
    assert law.is_measured and law.micro_batch == 50
