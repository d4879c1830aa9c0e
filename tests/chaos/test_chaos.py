"""A minute of chaos: every kind of fault at least once, and every promise kept."""

from __future__ import annotations

import os

import pytest

from .report import table
from .storm import Plan, storm, with_s3

SEED = 20260202


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_minute_of_every_fault_breaks_no_promise() -> None:
    seed = int(os.environ.get("CHAOS_SEED") or SEED)
    first = ("a box that is bad for good", "kill a node")
    plan = Plan(jobs=60, seed=seed, lease_s=4.0, gap_s=1.0, backlog=12, storm_s=37, first=first, s3=with_s3(seed))
    outcome = storm(plan)
    breaches = "\n".join(f"promise {b.promise}: {b.what}" for b in outcome.broken)
    assert not outcome.broken, f"CHAOS_SEED={seed}\n{breaches}\n{table(outcome)}\n" + "\n".join(outcome.log)
    assert outcome.faults.total() > 15, table(outcome)
    assert any(a.reason == "worker_lost" for a in outcome.history.attempts), table(outcome)
    assert outcome.faults["a box that is bad for good"], table(outcome)
    assert any(act.acknowledged for act in outcome.history.acts), table(outcome)
