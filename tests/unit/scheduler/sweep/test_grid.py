"""Which points a sweep runs: every combination, or draws that a seed repeats."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.errors import ExitCode, UsageError
from loractl.scheduler.sweep.answer import points, read_grid


def drawn(*settings: str, trials: int, seed: int = 0) -> list[dict[str, str]]:
    return points(read_grid(settings), trials, seed)


def test_a_grid_is_every_combination_and_one_value_holds_for_all() -> None:
    grid = read_grid(["lora.r=8,16", "training.max_steps=20", "training.learning_rate=1e-4, 3e-4"])
    assert grid.fixed == ("training.max_steps=20",)
    assert grid.given == {"lora.r": "8,16", "training.learning_rate": "1e-4, 3e-4"}
    assert points(grid, None, 0) == [
        {"lora.r": r, "training.learning_rate": rate} for r in ("8", "16") for rate in ("1e-4", "3e-4")
    ]


def test_commas_within_brackets_and_quotes_part_nothing() -> None:
    grid = read_grid(["lora.target_modules=[q_proj,v_proj],all-linear", 'labels.a="x,y"', "labels.b={c: 1, d: 2}"])
    assert [point["lora.target_modules"] for point in points(grid, None, 0)] == ["[q_proj,v_proj]", "all-linear"]
    assert grid.fixed == ('labels.a="x,y"', "labels.b={c: 1, d: 2}")


RANGES = ("training.learning_rate=log:1e-5..1e-3", "lora.lora_dropout=uniform:0..0.1", "lora.r=int:4..64")


def test_draws_are_repeated_by_their_seed_and_go_on_where_fewer_ended() -> None:
    twenty = drawn(*RANGES, "training.optim=sgd,adamw_torch", trials=20, seed=7)
    assert drawn(*RANGES, "training.optim=sgd,adamw_torch", trials=20, seed=7) == twenty
    assert drawn(*RANGES, "training.optim=sgd,adamw_torch", trials=5, seed=7) == twenty[:5]
    assert drawn(*RANGES, "training.optim=sgd,adamw_torch", trials=20, seed=8) != twenty
    assert {point["training.optim"] for point in twenty} == {"sgd", "adamw_torch"}
    assert len({tuple(point.values()) for point in twenty}) == 20


@given(st.integers(0, 2**32))
def test_a_draw_stays_in_its_range_and_is_written_with_four_digits(seed: int) -> None:
    for point in drawn(*RANGES, trials=8, seed=seed):
        rate, dropout, rank = (point[setting.partition("=")[0]] for setting in RANGES)
        assert 1e-5 <= float(rate) <= 1e-3 and 0 <= float(dropout) <= 0.1 and 4 <= int(rank) <= 64
        assert f"{float(rate):.4g}" == rate


def test_a_logarithmic_range_has_as_many_draws_in_each_decade() -> None:
    rates = [float(p["a"]) for p in drawn("a=log:1e-6..1e-2", trials=200)]
    decades = [sum(math.floor(math.log10(rate)) == n for rate in rates) for n in (-6, -5, -4, -3)]
    assert all(30 <= count <= 70 for count in decades), decades
    whole = [int(p["a"]) for p in drawn("a=int:1..4", "b=uniform:0..1", trials=200)]
    assert {whole.count(n) > 30 for n in (1, 2, 3, 4)} == {True}, "both ends as often as the middle"


def test_a_grid_with_trials_draws_so_many_different_points() -> None:
    some = drawn("a=1,2,3,4", "b=1,2,3,4", trials=16)
    assert sorted(some, key=str) == sorted(points(read_grid(["a=1,2,3,4", "b=1,2,3,4"]), None, 0), key=str)
    assert some != points(read_grid(["a=1,2,3,4", "b=1,2,3,4"]), None, 0), "in the order of the draw"


@pytest.mark.parametrize(
    ("settings", "trials", "says"),
    [
        ([], None, "needs a setting with several values"),
        (["lora.r=8"], None, "needs a setting with several values"),
        (["lora.r"], None, "--set lora.r is not of the form KEY=VALUE"),
        (["=8,16"], None, "is not of the form KEY=VALUE"),
        (["lora.r=8,16", "lora.r=32"], None, "--set lora.r is given twice"),
        (["lora.r=8,16,8"], None, "has the value 8 twice"),
        (["lora.r=8,,16"], None, "has an empty value"),
        (["lora.r=int:4..64"], None, "--set lora.r is a range, so its points are drawn"),
        (["lora.r=int:4..64.5"], 3, "ends that are not whole numbers"),
        (["lora.r=int:a..64"], 3, "is not a range of numbers"),
        (["a=uniform:0..nan"], 3, "is not a range of numbers"),
        (["a=uniform:1..1"], 3, "begins above its end"),
        (["a=log:0..1"], 3, "a logarithmic range begins above 0"),
        (["a=" + ",".join(map(str, range(201)))], None, "the grid has 201 points, a sweep at most 200 jobs"),
        (["a=int:1..1000"], 201, "a sweep has at most 200 jobs"),
        (["a=1,2,3", "b=1,2"], 7, "there are only 6 points"),
        (["a=int:1..3"], 4, "there are only 3 points"),
        (["a=uniform:1.00001..1.00002"], 9, "too narrow for 9 different points"),
    ],
)
def test_what_can_t_be_a_sweep_is_refused_with_a_hint(settings: list[str], trials: int | None, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        points(read_grid(settings), trials, 0)
    assert says in refused.value.sentence
    assert refused.value.hint and refused.value.exit_code == ExitCode.USAGE
