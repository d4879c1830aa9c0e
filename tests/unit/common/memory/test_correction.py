"""What measured peaks teach the plan: a factor by device, method and family, and jobs that were seen before."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need
from loractl.common.memory.correction import (
    FACTOR_BOUNDS,
    GROWTH,
    LIKE_IT_SPARE,
    MIN_MEASURED,
    Accuracy,
    Measured,
    accuracy,
    learned,
    peaks_like,
)
from loractl.common.units import GIB

PLAN = Need(lora=20 * GIB, qlora=8 * GIB)


def ran(peak: float | None, **changed: Any) -> Measured:
    """An attempt planned at 10 GiB that peaked at `peak`."""
    values = {
        "device_name": "NVIDIA A10", "method": Method.LORA, "family": "llama", "need_key": "other", "planned": 10 * GIB,
        "reserved": 10 * GIB, "peak": None if peak is None else int(peak * GIB), "out_of_memory": False,
    }  # fmt: skip
    return Measured(**{**values, **changed})


def test_nothing_measured_leaves_the_plan() -> None:
    assert learned(PLAN, "key", []) == PLAN
    assert learned(Need(lora=None, qlora=None), "key", []) == Need(lora=None, qlora=None)


def test_a_family_corrects_the_plan_from_the_third_run_on() -> None:
    runs = [ran(9), ran(9.2), ran(9.1)]
    assert learned(PLAN, "key", runs[: MIN_MEASURED - 1]) == PLAN
    ratios = [0.9, 0.92, 0.91]
    factor = statistics.fmean(ratios) + 2 * statistics.stdev(ratios)
    found = learned(PLAN, "key", runs)
    assert found.lora == pytest.approx(20 * GIB * factor, rel=1e-6)
    assert found.qlora == PLAN.qlora, "LoRA's runs say nothing of QLoRA"


def test_the_largest_factor_of_several_devices_counts() -> None:
    runs = [ran(9)] * 3 + [ran(12, device_name="NVIDIA A100")] * 3
    assert learned(PLAN, "key", runs).lora == int(20 * GIB * 1.2), "it may run on either"


@pytest.mark.parametrize(("peak", "factor"), [(1, FACTOR_BOUNDS[0]), (40, FACTOR_BOUNDS[1])])
def test_a_factor_stays_within_its_bounds(peak: float, factor: float) -> None:
    assert learned(PLAN, "key", [ran(peak)] * 3).lora == int(20 * GIB * factor)


def test_a_job_just_like_it_beats_the_family() -> None:
    runs = [ran(15)] * 5 + [ran(7, need_key="key"), ran(6, need_key="key")]
    assert learned(PLAN, "key", runs).lora == int(7 * GIB * LIKE_IT_SPARE)
    assert peaks_like("key", Method.LORA, runs) == [7 * GIB, 6 * GIB]
    assert peaks_like("key", Method.QLORA, runs) == []


def test_a_plan_that_could_not_be_made_is_what_a_job_like_it_took() -> None:
    unknown = Need(lora=None, qlora=None)
    found = learned(unknown, "key", [ran(7, need_key="key", planned=None)])
    assert found == Need(lora=int(7 * GIB * LIKE_IT_SPARE), qlora=None)


def test_what_was_too_little_is_too_little_again_for_the_same_job_alone() -> None:
    gone = ran(10, need_key="key", out_of_memory=True, reserved=24 * GIB)
    assert learned(PLAN, "key", [gone]).lora == int(24 * GIB * GROWTH)
    assert learned(PLAN, "another", [gone]) == PLAN
    assert learned(Need(lora=None, qlora=None), "key", [gone]).lora == int(24 * GIB * GROWTH)
    assert learned(PLAN, "key", [gone, ran(7, need_key="key")]).lora == int(24 * GIB * GROWTH)
    assert peaks_like("key", Method.LORA, [gone]) == [], "that it did not get further is no peak"


def test_accuracy_is_told_by_device_method_and_family() -> None:
    runs = [
        ran(9), ran(11), ran(8, method=Method.QLORA), ran(10, family=None), ran(None), ran(5, planned=None),
        ran(50, out_of_memory=True), ran(7, device_name="Tesla T4"),
    ]  # fmt: skip
    found = accuracy(runs)
    assert [(one.device_name, one.method.value, one.family, one.count) for one in found] == [
        ("NVIDIA A10", "lora", None, 1),
        ("NVIDIA A10", "lora", "llama", 2),
        ("NVIDIA A10", "qlora", "llama", 1),
        ("Tesla T4", "lora", "llama", 1),
    ]
    two = found[1]
    assert (two.ratio, two.worst, two.factor) == (pytest.approx(1.0), pytest.approx(1.1), None)
    assert two.spread == pytest.approx(statistics.stdev([0.9, 1.1]))
    assert found[0].spread == 0.0


@given(st.lists(st.floats(0.5, 1.6), min_size=MIN_MEASURED, max_size=30))
def test_a_factor_covers_what_was_seen_unless_the_plan_is_plainly_wrong(ratios: list[float]) -> None:
    (one,) = accuracy([ran(10 * ratio) for ratio in ratios])
    assert isinstance(one, Accuracy) and one.factor is not None
    low, high = FACTOR_BOUNDS
    assert low <= one.factor <= high
    assert one.factor >= min(high, max(ratios)) - 1e-6


@given(st.integers(1, 100 * GIB), st.lists(st.floats(1, 90), max_size=6), st.booleans())
def test_more_is_never_learned_from_less(planned: int, peaks: list[float], out_of_memory: bool) -> None:
    runs = [ran(peak, need_key="key", out_of_memory=out_of_memory, reserved=int(peak * GIB)) for peak in peaks]
    need = Need(lora=planned, qlora=None)
    for count in range(len(runs)):
        before, after = learned(need, "key", runs[:count]).lora, learned(need, "key", runs[: count + 1]).lora
        assert before is not None and after is not None
        assert after >= before or count == 0, "a further run like it may only raise what is reserved"
