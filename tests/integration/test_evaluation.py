"""What the comparison of base and tuned says, on scores whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loractl.worker.evaluate import BOOTSTRAP_SEED, Compared, in_batches, paired_interval
from loractl.worker.report import verdict

RNG = np.random.default_rng(3)


def compared(
    base: np.ndarray, tuned: np.ndarray, weight: np.ndarray, name: str = "loss", *, higher: bool = False
) -> Compared:
    b, t, low, high = paired_interval(base, tuned, weight)
    cases = int((weight > 0).sum())
    return Compared(
        name=name, label=name, unit="nats", higher_is_better=higher, cases=cases, base=b, tuned=t, low=low, high=high
    )


def test_a_clear_gain_is_better_and_a_clear_loss_is_worse() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    assert compared(base, base - 5, tokens).reading == "better"
    assert compared(base, base + 5, tokens).reading == "worse"
    assert compared(base, base + 5, tokens, higher=True).reading == "better"


def test_noise_around_zero_is_no_measurable_gain() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    noise = RNG.normal(0, 2, 40)
    same = compared(base, base + noise - noise.mean(), tokens)
    assert same.reading == "no clear change"
    said = verdict([same])
    assert said["reading"] == "no_measurable_gain" and said["sentence"].startswith("No measurable gain")


def test_a_model_that_did_not_change_has_an_interval_of_nothing() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    same = compared(base, base, tokens)
    assert (same.low, same.high, same.reading) == (0, 0, "no clear change")


def test_few_rows_are_too_few_however_large_the_change() -> None:
    said = verdict([compared(np.full(3, 50.0), np.full(3, 10.0), np.full(3, 10.0))])
    assert said["reading"] == "no_measurable_gain" and "Too few held-out rows (3)" in said["sentence"]


def test_rows_weigh_by_their_tokens() -> None:
    base, tuned, low, high = paired_interval(np.array([10.0, 300.0]), np.array([10.0, 100.0]), np.array([10.0, 100.0]))
    assert (base, tuned) == pytest.approx((310 / 110, 110 / 110))
    assert low <= tuned - base <= high


def test_the_interval_covers_the_true_change_about_95_times_in_100() -> None:
    covered = 0
    for n in range(60):
        rng = np.random.default_rng(BOOTSTRAP_SEED + n)
        base = rng.normal(3, 1, 50)
        _, _, low, high = paired_interval(base, base + rng.normal(-0.5, 1, 50), np.ones(50))
        covered += low <= -0.5 <= high
    assert covered >= 52, f"{covered} of 60"


def test_a_gain_in_loss_names_what_got_worse() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    better = compared(base, base - 5, tokens)
    worse = compared(np.full(40, 100.0), np.zeros(40), np.ones(40), name="exact match", higher=True)
    assert "worse on exact match" in verdict([better, worse])["sentence"]


def test_a_number_that_is_not_finite_is_never_called_better() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    assert compared(base, np.full(40, np.nan), tokens).reading == "no clear change"


def test_out_of_memory_halves_the_batch_and_every_row_is_still_scored_once() -> None:
    done: list[int] = []
    sizes: list[int] = []

    def work(chosen: list[int]) -> None:
        sizes.append(len(chosen))
        if len(chosen) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(chosen)

    in_batches(list(range(9)), 8, work)
    assert done == list(range(9))
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        in_batches([1], 8, lambda chosen: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
