"""What can never run is told: after a while, once, and not where a card comes that could hold it."""

from __future__ import annotations

from typing import Any

import pytest

from loractl.common.store.queries.outbox.notices import GRACE_S
from loractl.common.store.store import Store
from loractl.common.units import GIB

from ....databases import SQLITE_ALONE
from ...factories import Clock, node_state, submission
from .test_fleet_rounds import turn
from .test_outbox import ADA, OPS, all_due

OPS_TOLD = "tiny: can never run, needs 64.0 GiB, and the largest card has 48.0 GiB"


def large(**keys: Any) -> Any:
    """A job that is larger than a card of 48 GiB."""
    return submission(lora=80, qlora=64, **{"notify": ["ops"], **keys})


@pytest.fixture
def lab(timed: Store) -> Store:
    """A box with a card of 48 GiB."""
    timed.cards.see(node_state())
    return timed


def go_on(store: Store, clock: Clock, seconds: float, **state: Any) -> None:
    """The box lives so long, and goes round for the fleet."""
    end = clock.now.timestamp() + seconds
    while clock.now.timestamp() < end:
        clock.forward(30)
        store.cards.see(node_state(**state))
        turn(store)


@SQLITE_ALONE
def test_a_job_that_no_card_can_hold_is_told_once_after_ten_minutes(lab: Store, clock: Clock) -> None:
    lab.jobs.submit(large())
    lab.jobs.submit(large(notify=["me"], user="ada"))
    lab.jobs.submit(large(notify=[]))
    lab.jobs.submit(submission(notify=["ops"]))
    go_on(lab, clock, GRACE_S - 60)
    assert all_due(lab, OPS, ADA) == []
    go_on(lab, clock, 180)
    assert all_due(lab, OPS, ADA) == [("ada-mail", OPS_TOLD), ("ops", OPS_TOLD)]
    go_on(lab, clock, GRACE_S + 120)
    assert all_due(lab, OPS, ADA) == []


def test_a_box_that_comes_or_an_owner_who_edits_withdraws_it(lab: Store, clock: Clock) -> None:
    lab.jobs.submit(large())
    cancelled = lab.jobs.submit(large(name="other"))
    go_on(lab, clock, 120)
    lab.jobs.cancel(cancelled, "ada")
    lab.cards.see(node_state("big:0", total=80 * GIB))
    go_on(lab, clock, 120)
    lab.cards.forget("big:0")  # it is started anew, in order: the time begins again
    go_on(lab, clock, GRACE_S - 60)
    assert all_due(lab, OPS) == []
    go_on(lab, clock, 180)
    assert all_due(lab, OPS) == [("ops", OPS_TOLD)]


def test_a_label_that_no_box_has_a_limit_of_its_own_and_a_job_that_is_held(lab: Store, clock: Clock) -> None:
    lab.jobs.submit(submission(name="linked", notify=["ops"], resources={"node_labels": {"nvlink": "yes"}}))
    lab.jobs.submit(submission(name="thrifty", lora=8, qlora=6, notify=["ops"], resources={"max_vram": "1GiB"}))
    lab.jobs.submit(submission(name="patient", lora=80, qlora=40, notify=["ops"], lora_patience="2h"))
    lab.jobs.hold(lab.jobs.submit(large(name="held")), "ada")
    go_on(lab, clock, GRACE_S + 120)
    said = "can never run, its resources.max_vram is less than it needs with any method"
    linked = "can never run, no box has the label nvlink=yes"
    assert all_due(lab, OPS) == [("ops", f"linked: {linked}"), ("ops", f"thrifty: {said}")]


@SQLITE_ALONE
def test_nobody_is_told_while_no_box_is_known_or_one_can_not_be_read(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(large())
    for _ in range(30):
        clock.forward(60)
        turn(timed)
    timed.cards.see(node_state())
    timed.cards.see(node_state("broken:0", total=0, fault="the driver has lost it"))
    go_on(timed, clock, GRACE_S + 120)
    assert all_due(timed, OPS) == []


@SQLITE_ALONE
def test_the_members_of_a_sweep_are_one_message(lab: Store, clock: Clock) -> None:
    from loractl.common.job.sweep import NewSweep

    lab.sweeps.submit(NewSweep(name="grid", varied={}), [large() for _ in range(3)])
    go_on(lab, clock, GRACE_S + 120)
    assert all_due(lab, OPS) == [("ops", OPS_TOLD)]
