"""What the store keeps of how long jobs take, and what it says of those that wait."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from loractl.common.errors import ValueRefused
from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import Reason
from loractl.common.placement.duration import LONGEST_S, UNKNOWN_S, Basis
from loractl.common.store.records import Claim, Progress, StoredCheckpoint, Submission
from loractl.common.store.store import Store
from loractl.common.store.tables import CardContention
from loractl.common.units import GIB, LARGEST

from ...factories import RESULT, Clock, node_state, submission, take

DATA = {"path": {"uri": "datasets/x", "sha256": "a" * 64, "rows": 1000, "tokens": 100_000}}


def counted(user: str = "ada", base: str = "org/model", steps: int = 100, **keys: Any) -> Submission:
    """A job whose rows are counted: 16 rows of 100 tokens a step, and 10,000 tokens that are read at the end."""
    asked = submission(
        user=user,
        base_model=base,
        training={"max_steps": steps},
        evaluation={"samples": 0, "metrics": ["loss"]},
        **keys,
    )
    return replace(asked, data=DATA, plan=replace(asked.plan, parameters=10**9))


def started(store: Store, asked: Submission) -> Claim:
    store.jobs.submit(asked)
    claim = take(store)
    assert isinstance(claim, Claim)
    return claim


def ran(
    store: Store,
    clock: Clock,
    asked: Submission,
    *,
    step_s: float = 2.0,
    rest_s: float = 30.0,
    neighbours: float | None = None,
) -> Claim:
    """A job from its submit to its end: 10 s until its first step, and `rest_s` after its last one."""
    claim, steps = started(store, asked), asked.spec.training.max_steps or 0
    clock.forward(10 + steps * step_s + rest_s)
    told = Progress(step=steps, total_steps=steps, prepared_s=10.0, trained_s=steps * step_s, trained_steps=steps)
    told = replace(told, neighbours=neighbours)
    store.attempts.finish(claim, Reason.OK, "done", told, RESULT)
    return claim


def test_a_job_of_which_nothing_is_known_counts_as_an_hour_and_its_attempt_says_that_nothing_was_predicted(
    timed: Store,
) -> None:
    claim = started(timed, counted())
    assert timed.jobs.get(claim.job_id).work_left_s == UNKNOWN_S
    (attempt,) = timed.attempts.of_job(claim.job_id)
    assert (attempt.seconds_predicted, attempt.predicted_by, claim.seconds_predicted) == (None, None, None)
    assert timed.jobs.get(claim.job_id).eta_seconds is None


def test_what_one_job_took_predicts_the_next_one_on_its_base(timed: Store, clock: Clock) -> None:
    ran(timed, clock, counted())
    claim = started(timed, counted(user="eve", steps=50))
    (attempt,) = timed.attempts.of_job(claim.job_id)
    assert attempt.seconds_predicted == pytest.approx(10 + 50 * 2 + 30)
    assert (attempt.predicted_by, claim.seconds_predicted) == (Basis.BASE, attempt.seconds_predicted)
    row = timed.jobs.get(claim.job_id)
    assert row.work_left_s == row.eta_seconds == attempt.seconds_predicted


def test_jobs_that_wait_are_predicted_again_when_the_first_of_their_base_was_measured(
    timed: Store, clock: Clock
) -> None:
    first = started(timed, counted())
    waiting, other = (
        timed.jobs.submit(counted(steps=10)),
        timed.jobs.submit(replace(counted(base="org/other"), data={}, user="eve")),
    )
    clock.forward(240)
    told = Progress(step=100, total_steps=100, prepared_s=10.0, trained_s=200.0, trained_steps=100)
    timed.attempts.finish(first, Reason.OK, "done", told, RESULT)
    assert timed.jobs.get(waiting).work_left_s == pytest.approx(10 + 10 * 2 + 30)
    assert timed.jobs.get(other).work_left_s == UNKNOWN_S, "its rows were not counted, and eve's jobs have not ended"
    ran(timed, clock, counted(), step_s=2.1)
    assert timed.jobs.get(waiting).work_left_s == pytest.approx(60), "that was no surprise"


@pytest.mark.both
def test_a_job_that_was_stopped_has_only_the_steps_after_its_checkpoint_left(timed: Store, clock: Clock) -> None:
    ran(timed, clock, counted())
    claim = started(timed, counted(user="eve"))
    timed.attempts.keep_checkpoint(claim, StoredCheckpoint(step=60, prefix=f"jobs/{claim.job_id}/attempt-1/x"))
    clock.forward(130)
    told = Progress(step=60, total_steps=100, prepared_s=10.0, trained_s=120.0, trained_steps=60)
    timed.attempts.finish(claim, Reason.PREEMPTED, "gave way", told)
    assert timed.jobs.get(claim.job_id).work_left_s == pytest.approx(10 + 40 * 2 + 30)


def test_an_edit_predicts_the_job_again(timed: Store, clock: Clock) -> None:
    from loractl.scheduler.change.amendment import amendment

    ran(timed, clock, counted())
    job_id = timed.jobs.submit(counted(steps=10))
    assert timed.jobs.get(job_id).work_left_s == pytest.approx(60)
    timed.jobs.edit(amendment(timed, job_id, ["training.max_steps=20"]), "ada")
    assert timed.jobs.get(job_id).work_left_s == pytest.approx(80)


@pytest.mark.both
def test_what_was_predicted_is_kept_beside_what_it_took(timed: Store, clock: Clock) -> None:
    ran(timed, clock, counted())
    ran(timed, clock, counted(), step_s=4.0)
    (one,) = timed.attempts.predicted()
    assert (one.basis, one.predicted_s, one.took_s) == (Basis.BASE, pytest.approx(240), pytest.approx(440))


@pytest.mark.both
def test_a_prediction_is_judged_by_what_the_job_would_have_taken_alone(timed: Store, clock: Clock) -> None:
    """A prediction is of a card alone: a run beside another made a right one look wrong, and was a surprise."""
    ran(timed, clock, counted())
    waiting = timed.jobs.submit(counted())
    before = timed.jobs.get(waiting).forecasts
    ran(timed, clock, counted(user="eve", priority=5), step_s=3.0, rest_s=45.0, neighbours=1.0)
    assert timed.jobs.get(waiting).forecasts == before, "no surprise: nothing is predicted again"
    (one,) = timed.attempts.predicted()
    assert (one.predicted_s, one.took_s) == (pytest.approx(240), pytest.approx((10 + 300 + 45) / 1.5))
    with Session(timed.engine) as session, session.begin():
        session.add(CardContention(device_name="NVIDIA A40", contention=0.0))
    (one,) = timed.attempts.predicted()
    assert one.took_s == pytest.approx(10 + 300 + 45)


def test_a_sweep_is_predicted_like_its_members(timed: Store, clock: Clock) -> None:
    ran(timed, clock, counted())
    many = timed.jobs.submit_all([counted(steps=n, name=f"m{n}") for n in (10, 20)])
    assert [timed.jobs.get(one).work_left_s for one in many] == pytest.approx([60, 80])


def test_a_length_that_no_row_can_hold_stops_neither_the_end_of_another_job_nor_a_submit_nor_a_claim(
    timed: Store, clock: Clock
) -> None:
    first = started(timed, counted())
    endless = timed.jobs.submit(counted(user="eve", steps=LARGEST))
    clock.forward(740)
    told = Progress(step=100, total_steps=100, prepared_s=10.0, trained_s=700.0, trained_steps=100)
    timed.attempts.finish(first, Reason.OK, "done", told, RESULT)
    assert timed.jobs.get(endless).work_left_s == LONGEST_S
    claim = take(timed)
    assert isinstance(claim, Claim) and claim.job_id == endless and claim.seconds_predicted == LONGEST_S
    assert timed.jobs.get(timed.jobs.submit(counted(steps=LARGEST))).work_left_s == LONGEST_S


def test_rows_of_less_than_a_token_stop_no_later_claim(timed: Store, clock: Clock) -> None:
    ran(timed, clock, replace(counted(), data={"path": {**DATA["path"], "rows": 4, "tokens": 0}}))
    assert started(timed, counted(user="eve")).seconds_predicted


WRONG = (
    {"steps": 1, "step_tokens": 0, "closing_tokens": 0, "parameters": None},
    {"steps": 1, "step_tokens": 1e300, "closing_tokens": 1, "parameters": None},
    {"steps": 1, "step_tokens": 1, "closing_tokens": 0},
)


@pytest.mark.both
def test_an_extent_that_a_login_writes_by_hand_stops_nobody_else(timed: Store, clock: Clock) -> None:
    """A login that submits may write its own row by hand."""
    ran(timed, clock, counted())
    number = timed.jobs.submit(counted())

    def write(extent: dict[str, Any]) -> None:
        with timed.jobs._write() as tx:
            row = {"extent": json.dumps(extent), "number": number}
            tx.session.execute(text("UPDATE jobs SET extent = :extent WHERE job_id = :number"), row)

    for wrong in WRONG:
        with pytest.raises(ValueRefused):
            write(wrong)
    write({"steps": 2**50, "step_tokens": 1e30, "closing_tokens": 1e30, "parameters": 1, "of a newer version": 1})
    claim = take(timed)
    assert isinstance(claim, Claim) and claim.seconds_predicted == pytest.approx(240), "as its row says"
    timed.attempts.finish(claim, Reason.PREEMPTED, "gave way", Progress())
    assert timed.jobs.get(number).work_left_s == LONGEST_S
    claim = take(timed)
    assert isinstance(claim, Claim) and claim.seconds_predicted == LONGEST_S
    timed.attempts.finish(claim, Reason.OK, "done", Progress(trained_s=0.1, trained_steps=1), RESULT)
    ran(timed, clock, counted(user="eve"))


@pytest.mark.parametrize("data", [{"path": "x"}, {"path": {"uri": "s3://x", "sha256": "y", "rows": "many"}}])
def test_data_of_another_shape_are_refused_before_they_are_counted(timed: Store, data: dict[str, Any]) -> None:
    with pytest.raises(ValueRefused, match="refuses the value of data"):
        timed.jobs.submit(replace(submission(), data=data))


def test_an_attempt_on_several_cards_has_no_prediction_of_one_card(timed: Store, clock: Clock) -> None:
    ran(timed, clock, counted())
    for node in ("box:0", "box:1"):
        timed.cards.see(node_state(node, gangs=True, max_jobs=1, total=24 * GIB))
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=20 * GIB, qlora=None))
    job_id = timed.jobs.submit(replace(counted(method="lora"), ways=Ways(alone=False, gangs=(way,))))
    assert timed.jobs.get(job_id).forecasts
    claim = timed.attempts.claim("box:0", gangs=True)
    assert isinstance(claim, Claim) and len(claim.shares) == 2
    assert claim.seconds_predicted is None and timed.jobs.get(job_id).eta_seconds is None


def test_a_job_that_is_submitted_while_no_worker_runs_is_predicted_too(timed: Store, clock: Clock) -> None:
    ran(timed, clock, counted())
    timed.cards.forget("box:0")
    job_id = timed.jobs.submit(counted(steps=50))
    assert timed.jobs.get(job_id).work_left_s == pytest.approx(10 + 50 * 2 + 30)
    claim = take(timed)
    assert isinstance(claim, Claim) and claim.seconds_predicted == pytest.approx(140)


@pytest.mark.both
def test_what_jobs_cost_each_other_on_a_model_of_card_is_measured_and_kept(timed: Store, clock: Clock) -> None:
    def alike() -> Submission:
        return replace(counted(), plan=replace(counted().plan, need_key="alike"))

    def contention() -> float | None:
        return timed.cards.fleet().cards["box:0"].contention

    for _ in range(3):
        ran(timed, clock, alike(), neighbours=0.0)
    ran(timed, clock, alike(), step_s=3.2, neighbours=1.0)
    ran(timed, clock, alike(), step_s=3.2, neighbours=1.0)
    assert contention() is None
    ran(timed, clock, alike(), step_s=3.2, neighbours=1.0)
    assert contention() == pytest.approx(0.6)
    for _ in range(3):
        ran(timed, clock, alike(), step_s=4.4, neighbours=2.0)
    assert contention() == pytest.approx(0.6), "what it corrects is measured uncorrected"
    assert timed.jobs.get(timed.jobs.submit(alike())).work_left_s == pytest.approx(240, rel=0.05), "alone on a card"
    timed.cards.forget("box:0")
    timed.cards.see(node_state("other:0"))
    timed.cards.see(node_state("h:0", device_name="NVIDIA H100"))
    cards = timed.cards.fleet().cards
    assert (cards["other:0"].contention, cards["h:0"].contention) == (pytest.approx(0.6), None)
