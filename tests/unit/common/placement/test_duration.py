"""How long a job is predicted to take, and by what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loractl.common.placement.duration import (
    CONTENTION,
    MOST_CONTENTION,
    UNKNOWN_S,
    Basis,
    Extent,
    TimedRun,
    TimeMeasured,
    Undone,
    extent_of,
    forecast,
    measured_contention,
    seconds_left,
    shortest,
    time_accuracy,
)

from ...factories import spec

EXTENT = Extent(steps=100, step_tokens=1000.0, closing_tokens=5000.0, parameters=10**9)
ROWS = {"path": {"rows": 1000, "tokens": 100_000}}


def job(**changed: Any) -> Undone:
    known = {"user": "ada", "base_model": "b", "method": "lora", "need_key": "k", "extent": EXTENT}
    return Undone(**{**known, **changed})


def run(pace: float = 1e-3, **changed: Any) -> TimedRun:
    """A whole run of `job` at `pace` seconds a token: 20 s until its first step, and twice what is counted after its
    last one."""
    extent = changed.get("extent", EXTENT)
    trained = pace * 100 * extent.step_tokens
    known = {
        "user": "eve", "base_model": "b", "method": "lora", "need_key": "other", "device": "A40", "extent": extent,
        "prepared_s": 20.0, "trained_s": trained, "steps": 100,
        "seconds": 20.0 + trained + 2 * (extent.closing_tokens * pace + 2.0),
    }  # fmt: skip
    return TimedRun(**{**known, **changed})


def test_a_job_takes_the_time_to_prepare_its_steps_and_what_follows_them() -> None:
    found = forecast(job(), "A40", [run()])
    assert (found.basis, found.count) == (Basis.BASE, 1)
    assert found.step_s == pytest.approx(1.0)
    assert found.seconds == pytest.approx(20 + 100 + 2 * (5 + 2))


def test_only_the_steps_after_its_checkpoint_are_left() -> None:
    whole, rest = forecast(job(), "A40", [run()]), forecast(job(step=75), "A40", [run()])
    assert whole.seconds - rest.seconds == pytest.approx(75.0)
    recounted = forecast(job(step=75, steps=80), "A40", [run()])
    assert rest.seconds - recounted.seconds == pytest.approx(20.0), "its trainer has counted 80 steps"


def test_the_nearest_measurement_decides() -> None:
    far = run(9e-3, device="H100", base_model="c", extent=replace(EXTENT, parameters=3 * 10**9))
    assert forecast(job(), "A40", [far]).basis is Basis.BASES
    assert forecast(job(), "A40", [far]).step_s == pytest.approx(3.0), "a third of the parameters"
    other = run(4e-3, device="H100")
    assert (forecast(job(), "A40", [other, far]).basis, forecast(job(), "A40", [other]).step_s) == (Basis.CARDS, 4.0)
    here = run(2e-3)
    assert forecast(job(), "A40", [far, other, here]).step_s == pytest.approx(2.0)
    like = run(3e-3, need_key="k")
    found = forecast(job(), "A40", [here, here, here, like])
    assert (found.basis, found.count, found.step_s) == (Basis.LIKE, 1, pytest.approx(3.0))
    assert forecast(job(method="qlora"), "A40", [here]).basis is Basis.BASES, "another method is another pass"


def test_what_follows_the_last_step_is_taken_from_jobs_of_its_method_first() -> None:
    slow = run(method="qlora", seconds=20.0 + 100.0 + 70.0)
    assert forecast(job(), "A40", [slow, slow, run()]).seconds == pytest.approx(20 + 100 + 14)
    assert forecast(job(method="qlora"), "A40", [slow, run()]).seconds == pytest.approx(20 + 100 + 70)


def test_another_card_is_scaled_by_the_speeds_that_were_measured() -> None:
    slow, fast = run(4e-3, base_model="c"), run(1e-3, base_model="c", device="H100")
    found = forecast(job(), "A40", [run(2e-3, device="H100"), slow, fast])
    assert found.basis is Basis.CARDS
    assert found.step_s == pytest.approx(2.0 * 4e-3 / 1.5e-3), "the H100's speed is the median of what ran there"
    cards = [forecast(job(), device, [run(2e-3, device="H100"), slow, fast]) for device in ("A40", "H100")]
    assert shortest(cards).step_s == pytest.approx(2.0)


def test_a_job_whose_rows_were_not_counted_takes_as_long_as_its_users_jobs_did() -> None:
    unknown = job(extent=None)
    assert forecast(unknown, "A40", [run()]).seconds == UNKNOWN_S
    mine = [run(user="ada", seconds=300.0), run(user="ada", seconds=500.0), run(user="ada", seconds=900.0)]
    found = forecast(unknown, "A40", [run(seconds=1.0), *mine])
    assert (found.seconds, found.basis, found.count) == (500.0, Basis.PAST, 3)
    elsewhere = [replace(one, base_model="c") for one in mine]
    assert forecast(unknown, "A40", [*elsewhere, mine[0]]).seconds == 300.0, "on the same base first"
    half = job(extent=None, step=50, steps=100)
    assert forecast(half, "A40", mine).seconds == 250.0


def test_nothing_is_known_of_the_first_job_of_a_lab() -> None:
    found = forecast(job(), "A40", [])
    assert (found.seconds, found.basis, found.is_known, found.step_s) == (UNKNOWN_S, Basis.UNKNOWN, False, None)
    assert shortest([]).seconds == UNKNOWN_S
    assert shortest([found, forecast(job(), "A40", [run(1.0)])]).basis is Basis.BASE, "what is known first"


def test_a_run_that_ended_badly_teaches_its_pace_alone() -> None:
    broken = run(seconds=None)
    assert forecast(job(), "A40", [broken]).seconds == pytest.approx(20 + 100 + 5 + 2)
    assert forecast(job(), "A40", [replace(broken, steps=None, trained_s=None)]).basis is Basis.UNKNOWN


def test_what_outlives_its_prediction_counts_as_longer() -> None:
    assert seconds_left(100.0, 40.0) == 60.0
    assert seconds_left(100.0, 100.0) == 10.0
    assert seconds_left(100.0, 5000.0) == 500.0


def test_steps_and_tokens_follow_from_the_rows() -> None:
    asked = spec(
        dataset={"path": "org/data", "test_size": 0.1, "max_length": 1024},
        training={"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        evaluation={"samples": 8, "max_new_tokens": 10, "per_device_eval_batch_size": 8},
    )
    found = extent_of(asked, ROWS, 7)
    assert found is not None and found.parameters == 7
    assert found.steps == 2 * 113, "900 rows to train on, 8 a step"
    assert found.step_tokens == 800.0
    assert found.closing_tokens == 2 * 0.5 * (100 * 100 + 8 * (100 + 10 * (5 + 32 / 8)))
    assert extent_of(asked, {}, 7) is None and extent_of(asked, {"path": {"sha256": "x"}}, 7) is None


def test_only_the_rows_that_a_split_names_are_counted() -> None:
    more = {"path": "org/more", "split": "train[:25%]"}
    asked = spec(
        dataset={
            "path": "org/data",
            "split": "train[:100]",
            "more": [more],
            "eval_path": "org/e",
            "eval_split": "test[:10]",
        },
        training={"num_train_epochs": 1},
        evaluation={"samples": 0},
    )
    every = {"more.0": {"rows": 400, "tokens": 40_000}, "eval_path": {"rows": 50}}
    found = extent_of(asked, {**ROWS, **every}, None)
    assert found is not None and found.steps == 13, "200 rows, 16 a step"
    assert found.closing_tokens == 2 * 0.5 * 10 * 100


def test_rows_that_an_early_version_counted_without_tokens_say_nothing() -> None:
    assert extent_of(spec(), {"path": {"rows": 1000, "bytes": 5}}, None) is None


def test_max_length_packing_and_evaluations_between_steps_count() -> None:
    def extent(**keys: Any) -> Extent:
        found = extent_of(spec(**keys), ROWS, None)
        assert found is not None
        return found

    short = {"path": "org/data", "max_length": 50, "test_size": 0.1}
    assert extent(dataset=short).step_tokens == 16 * 50
    packed = extent(dataset={**short, "max_length": 1000}, training={"packing": True, "num_train_epochs": 1})
    assert (packed.steps, packed.step_tokens) == (6, 16_000.0), "90 full rows, 16 a step"
    watched = extent(training={"eval_steps": 10, "max_steps": 100})
    assert watched.step_tokens == 16 * 100 + 0.5 * 100 * 100 / 10
    assert watched.steps == 100


def test_accuracy_is_the_factor_by_which_predictions_were_off() -> None:
    def measured(predicted: float, took: float, basis: Basis = Basis.BASE) -> TimeMeasured:
        return TimeMeasured(device_name="A40", basis=basis, predicted_s=predicted, took_s=took)

    some = [measured(100, took) for took in (50, 90, 100, 120, 400)]
    like, base = time_accuracy([*some, measured(10, 11, Basis.LIKE)])
    assert (like.basis, like.count, like.off) == (Basis.LIKE, 1, 1.1)
    assert (base.count, base.ratio, base.off, base.worst) == (5, 1.0, 1.2, 4.0)


def test_a_pass_next_to_other_jobs_counts_as_it_would_be_alone() -> None:
    alone, beside = run(), run(1.75e-3, neighbours=1.5)
    assert beside.slowed == 1 + CONTENTION * 1.5 == 1.75
    assert forecast(job(), "A40", [alone]).step_s == pytest.approx(1.0)
    assert forecast(job(), "A40", [beside]).step_s == pytest.approx(1.0)
    measured = run(1.3e-3, neighbours=1.0, contention=0.3)
    assert forecast(job(), "A40", [measured]).step_s == pytest.approx(1.0)
    whole = run(extent=EXTENT, seconds=400.0, neighbours=1.0, user="ada", trained_s=None)
    assert forecast(replace(job(), extent=None), "A40", [whole]).seconds == pytest.approx(400 / 1.5)


def test_contention_is_measured_by_jobs_just_alike_alone_and_next_to_others() -> None:
    alone, one, two = run(neighbours=0.0), run(1.6e-3, neighbours=1.0), run(2.2e-3, neighbours=2.0)
    assert measured_contention([alone, one] * 3, "A40") == pytest.approx(0.6)
    assert measured_contention([alone, alone, alone, one, two, two], "A40") == pytest.approx(0.6), "for each other job"
    part = run(1.54e-3, neighbours=0.9)
    assert measured_contention([alone, part] * 3, "A40") == pytest.approx(0.6), "of nine steps in ten"
    known = replace(one, contention=0.6)
    assert measured_contention([alone, known] * 3, "A40") == pytest.approx(0.6), "what was measured before adds nothing"
    assert measured_contention([alone, run(0.9e-3, neighbours=1.0)] * 3, "A40") == 0.0
    assert measured_contention([run(1e-300, neighbours=0.0), one] * 3, "A40") == MOST_CONTENTION
    assert measured_contention([alone, one, one] * 2, "A40") is None, "two alone are too few"
    assert measured_contention([alone, alone, one] * 2, "A40") is None
    assert measured_contention([alone, one] * 3, "H100") is None
    other = replace(one, need_key="another")
    assert measured_contention([alone, other] * 3, "A40") is None, "another job may take other steps"
    assert measured_contention([replace(alone, roomy=True), one] * 3, "A40") is None, "it did without recomputing"
    assert measured_contention([replace(alone, need_key=None), replace(one, need_key=None)] * 3, "A40") is None
    assert measured_contention([replace(alone, neighbours=None), one] * 3, "A40") is None, "an older worker's"


def test_nothing_measured_after_the_last_step_is_a_measurement() -> None:
    assert forecast(job(), "A40", [run(seconds=120.0)]).seconds == pytest.approx(20 + 100)
