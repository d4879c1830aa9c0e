"""Numbers beyond what a card, the calendar or the database holds end in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loractl.common.errors import SweepNotFound, UsageError
from loractl.common.store.store import Store
from loractl.scheduler.fleet.command import end_of_drain
from loractl.scheduler.submit.need import plan_job

from ..factories import NOON, spec
from .submit.test_need import SMALL


@pytest.mark.parametrize("text", ["99999999d", "9999999999d"])
def test_a_drain_ends_within_the_calendar(text: str) -> None:
    with pytest.raises(UsageError, match="is neither a duration nor a time"):
        end_of_drain(text, NOON)


def test_a_plan_that_no_card_could_ever_hold_is_refused_before_it_is_a_row(store: Store, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    huge = spec(
        base_model=str(tmp_path),
        dataset={"path": "org/data", "max_length": 2**20},
        training={"per_device_train_batch_size": 2**16, "exact": True},
    )
    with pytest.raises(UsageError, match="which no card has"):
        store.jobs.submit(plan_job(huge, "ada", {}, store))
    assert store.jobs.matching() == []


def test_a_sweep_with_a_number_that_no_database_takes_does_not_exist(store: Store) -> None:
    for number in (10**20, 2**31, 0, -1):
        with pytest.raises(SweepNotFound):
            store.sweeps.get(number)
        with pytest.raises(SweepNotFound):
            store.sweeps.cancel(number, "ada")
