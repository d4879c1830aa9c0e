"""The fair share: what counts against a user, and for how long."""

from __future__ import annotations

import pytest

from loractl.common.placement.shares import HALF_LIFE_S, charge, decayed
from loractl.common.units import GIB


def test_a_running_job_counts_as_an_hour_at_least_and_use_is_half_forgotten_after_a_day() -> None:
    assert charge(3.0, [(2 * GIB, 60.0), (4 * GIB, 7200.0)]) == pytest.approx(3.0 + 2.0 + 8.0)
    assert decayed(8.0, HALF_LIFE_S) == pytest.approx(4.0)
    assert decayed(8.0, -5.0) == pytest.approx(8.0)
