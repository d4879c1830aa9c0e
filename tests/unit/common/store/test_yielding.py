"""A running job yields its card to a much shorter one: the lab's round, claims and histories."""

from __future__ import annotations

import datetime as dt

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from loractl.common.errors import UsageError
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.placement.duration import Basis
from loractl.common.placement.preemption import COST_SHARE, UNDISTURBED_S
from loractl.common.store.database import make_engine
from loractl.common.store.fleet import LEAVES_IN_S
from loractl.common.store.records import Claim, Progress, StoredCheckpoint
from loractl.common.store.schema import HEAD, alembic_config, upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Attempt, Job
from loractl.common.units import GIB
from loractl.scheduler.change.amendment import amendment
from loractl.scheduler.status.job import job_in_full
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.wait.queue import waiting_jobs
from loractl.scheduler.why.answer import why
from loractl.scheduler.why.text import why_text

from ...factories import Clock, node_state, submission
from ...scheduler.screens import PIPE

BOX = "box:0"
HOURS = 3600.0
SOON = dt.timedelta(seconds=LEAVES_IN_S)
PREPARED_S = 8.0  # so that a stop is worth it after ten minutes
SIZE = {"lora": 20, "method": "lora"}


class Lab:
    """One card, and a long job on it."""

    def __init__(self, store: Store, clock: Clock, **keys: object) -> None:
        self.store, self.clock = store, clock
        self.see()
        self.job_id = store.jobs.submit(submission(**{**SIZE, **keys}))
        self.claim = self.take()

    def see(self) -> None:
        self.store.cards.see(node_state(BOX, max_jobs=1, total=24 * 2**30))

    def take(self) -> Claim:
        taken = self.store.attempts.claim(BOX)
        assert isinstance(taken, Claim), taken
        return taken

    def beat(self, left_s: float | None = 9 * HOURS, stage: Stage = Stage.TRAINING) -> int | None:
        """What the running job reports; for which job it is to stop."""
        self.see()
        told = Progress(stage=stage, eta_seconds=left_s, prepared_s=PREPARED_S, step=5)
        return self.store.attempts.beat(self.claim, told).preempted_by

    def short(self, left_s: float = 120.0, **keys: object) -> int:
        """A job of that length waits."""
        job_id = self.store.jobs.submit(submission(**{**SIZE, "user": "bob", **keys}))
        with Session(self.store.engine) as session, session.begin():
            session.execute(update(Job).where(Job.job_id == job_id).values(work_left_s=left_s))
        return job_id

    def give_way(self) -> None:
        self.store.attempts.finish(self.claim, Reason.PREEMPTED, "gave way to job 2", Progress(step=6))

    def text(self, job_id: int) -> str:
        return "\n".join(event.text for event in self.store.jobs.events(job_id))


@pytest.fixture
def lab(timed: Store, clock: Clock) -> Lab:
    lab = Lab(timed, clock)
    lab.beat()
    clock.forward(UNDISTURBED_S)
    lab.beat()
    return lab


@pytest.mark.both
def test_a_long_job_yields_to_a_short_one_and_goes_on_after_it(lab: Lab) -> None:
    short = lab.short()
    assert lab.store.cards.preempt() == (lab.job_id,)
    assert lab.store.cards.preempt() == (), "it was asked already"
    assert lab.beat() == short
    lab.give_way()
    row = lab.store.jobs.get(lab.job_id)
    assert (row.status, row.retries_used, row.stops) == (Status.QUEUED, 0, 1)
    assert row.message == f"gave way to job {short}, which is much shorter"
    why = "much shorter: 2 min against 9 h 00 min left"
    assert f"asked to give way to job {short} ({why})" in lab.text(lab.job_id)
    assert f"takes the room of job {lab.job_id} on {BOX}" in lab.text(short)
    given = lab.take()
    assert given.job_id == short
    lab.store.attempts.finish(given, Reason.CANCELLED, "over", Progress())
    lab.claim = lab.take()
    assert (lab.claim.job_id, lab.claim.attempt) == (lab.job_id, 2)


def test_after_each_stop_it_runs_undisturbed_for_twice_as_long(lab: Lab) -> None:
    for stops in range(4):
        lab.short()
        assert lab.store.cards.preempt() == (lab.job_id,), stops
        lab.give_way()
        lab.store.attempts.finish(lab.take(), Reason.CANCELLED, "over", Progress())
        lab.claim = lab.take()
        lab.beat()
        lab.clock.forward(UNDISTURBED_S * 2 ** (stops + 1) - 5)
        lab.beat()
        waits = lab.short()
        assert lab.store.cards.preempt() == ()
        lab.store.jobs.cancel(waits, "bob")
        lab.clock.forward(6)
        lab.beat()


@pytest.mark.parametrize("stage", [Stage.PREPARING, Stage.EVALUATING, Stage.STORING])
def test_a_job_that_does_not_train_does_not_yield(lab: Lab, stage: Stage) -> None:
    lab.beat(stage=stage)
    lab.short()
    assert lab.store.cards.preempt() == ()


def test_a_job_that_is_not_much_longer_does_not_yield(lab: Lab) -> None:
    lab.short(left_s=2.3 * HOURS)
    assert lab.store.cards.preempt() == ()
    lab.beat(left_s=9.3 * HOURS)
    assert lab.store.cards.preempt() == (lab.job_id,)


@pytest.mark.parametrize(
    ("preemptible", "urgent", "shorter"), [("auto", False, True), (True, True, True), (False, False, False)]
)
def test_preemptible_says_for_whom_a_job_stops(
    timed: Store, clock: Clock, preemptible: object, urgent: bool, shorter: bool
) -> None:
    lab = Lab(timed, clock, preemptible=preemptible)
    lab.beat()
    high = lab.short(left_s=8 * HOURS, priority=5)
    assert timed.cards.preempt() == ((lab.job_id,) if urgent else ())
    if not urgent:
        timed.jobs.cancel(high, "bob")
        clock.forward(UNDISTURBED_S)
        lab.beat()
        lab.short()
        assert timed.cards.preempt() == ((lab.job_id,) if shorter else ())
    else:
        lab.give_way()
        assert timed.jobs.get(lab.job_id).message == "gave way to job 2, which has a higher priority"


def test_a_lab_says_whether_and_when_jobs_yield(timed: Store, clock: Clock) -> None:
    lab = Lab(timed, clock)
    lab.beat()
    clock.forward(5)
    lab.beat()
    lab.short()
    timed.lab.set("give-way", "4")
    timed.lab.set("order", "share")
    assert timed.cards.preempt() == (), "the order of before knows no lengths"
    timed.lab.set("order", "work")
    timed.lab.set("give-way", "off")
    assert timed.cards.preempt() == ()
    timed.lab.set("give-way", "4")
    assert timed.cards.preempt() == (lab.job_id,)


def test_a_box_s_owner_may_keep_its_jobs(lab: Lab) -> None:
    lab.short()
    lab.store.cards.see(node_state(BOX, max_jobs=1, total=24 * 2**30, keeps_jobs=True))
    assert lab.store.cards.preempt() == ()
    lab.see()
    assert lab.store.cards.preempt() == (lab.job_id,)


def test_a_lost_worker_in_the_middle_of_giving_way_loses_neither_job(lab: Lab) -> None:
    short = lab.short()
    assert lab.store.cards.preempt() == (lab.job_id,)
    lab.clock.forward(61)
    assert [job_id for job_id, _ in lab.store.attempts.reap()] == [lab.job_id]
    lab.see()
    assert lab.take().job_id == short
    row = lab.store.jobs.get(lab.job_id)
    assert (row.status, row.stops, row.preempted_by) == (Status.QUEUED, 0, None)


def test_why_says_who_gives_way_to_whom_before_and_after(lab: Lab) -> None:
    short = lab.short()

    def said(job_id: int) -> str:
        return why_text(why(lab.store, job_id, in_other_forms=False), PIPE)

    assert f"{BOX} when job {lab.job_id} gives way to it" in said(short), "the next round will ask"
    assert waiting_jobs(lab.store, [lab.store.jobs.get(short)]).starts[short].at <= lab.clock() + SOON
    lab.store.cards.preempt()
    assert f"{BOX} when job {lab.job_id} gives way to it" in said(short)
    assert f"giving way to job {short}" in job_text(job_in_full(lab.store, lab.job_id), PIPE)
    lab.give_way()
    assert lab.take().job_id == short
    stopped = f"It gave way to job {short}, which is much shorter; it goes on from its checkpoint."
    assert stopped in said(lab.job_id) and stopped in job_text(job_in_full(lab.store, lab.job_id), PIPE)
    assert "give" not in said(lab.short(left_s=3 * HOURS)).partition("\n\n")[0]


@pytest.mark.both
def test_jobs_of_before_the_upgrade_keep_their_cards_and_go_on(upgraded_url: str) -> None:
    from alembic import command

    engine = make_engine(upgraded_url)
    store = Store(engine)
    store.cards.see(node_state(BOX, max_jobs=1, total=24 * 2**30))
    runs, waits, willing, silent = (
        store.jobs.submit(submission(**{**SIZE, "preemptible": said})) for said in (False, False, True, False)
    )
    claim = store.attempts.claim(BOX)
    assert isinstance(claim, Claim) and claim.job_id == runs
    with engine.begin() as connection, alembic_config(connection) as config:
        command.downgrade(config, "0047")
    with Session(engine) as session, session.begin():
        spec = session.scalars(select(Job.spec).where(Job.job_id == silent)).one()
        without = {key: value for key, value in spec.items() if key != "preemptible"}
        session.execute(update(Job).where(Job.job_id == silent).values(spec=without))
    assert upgrade(engine) == ("0047", HEAD)
    rows = {job.job_id: job for job in store.jobs.matching()}
    assert {number: row.yields for number, row in rows.items()} == {
        runs: False, waits: False, willing: True, silent: False,
    }  # fmt: skip
    assert rows[silent].spec["preemptible"] is False, "an edit of another key does not change it"
    assert store.jobs.never_yielding() == 3
    assert store.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=1)).accepted
    assert store.attempts.finish(claim, Reason.DRAINED, "over", Progress(step=2)) is Status.QUEUED
    assert isinstance(store.attempts.claim(BOX), Claim)
    engine.dispose()


@pytest.mark.both
def test_what_gave_way_goes_on_by_its_method_and_in_its_micro_batches_or_waits(timed: Store, clock: Clock) -> None:
    forms = {4: 40.0, 2: 23.0, 1: 15.0}
    large = {"total": 28 * GIB, "max_jobs": 1}
    timed.cards.see(node_state(BOX, **large))
    long = timed.jobs.submit(submission(lora=12, qlora=4, roomy=forms, training={"per_device_train_batch_size": 4}))
    claim = timed.attempts.claim(BOX)
    assert isinstance(claim, Claim) and (claim.method, claim.adjustment.micro_batch) == (Method.LORA, 2)
    kept = StoredCheckpoint(step=9, prefix=f"jobs/{long}/attempt-1/checkpoint-9", manifest_sha256="0" * 64)
    timed.attempts.keep_checkpoint(claim, kept)
    timed.attempts.beat(claim, Progress(stage=Stage.TRAINING, eta_seconds=9 * HOURS, prepared_s=PREPARED_S))
    clock.forward(UNDISTURBED_S)
    timed.cards.see(node_state(BOX, **large))
    timed.attempts.beat(claim, Progress(stage=Stage.TRAINING, eta_seconds=9 * HOURS))
    short = timed.jobs.submit(submission(lora=20, method="lora", user="bob"))
    with Session(timed.engine) as session, session.begin():
        session.execute(update(Job).where(Job.job_id == short).values(work_left_s=60.0))
    assert timed.cards.preempt() == (long,)
    timed.attempts.finish(claim, Reason.PREEMPTED, "gave way", Progress(step=9))
    first = timed.attempts.claim(BOX)
    assert isinstance(first, Claim) and first.job_id == short
    timed.cards.see(node_state("box:1", total=8 * GIB, max_jobs=1))
    assert timed.attempts.claim("box:1") is None, "as QLoRA it would begin again"
    timed.attempts.finish(first, Reason.CANCELLED, "over", Progress())
    timed.cards.see(node_state(BOX, **{**large, "total": 80 * GIB}))
    again = timed.attempts.claim(BOX)
    assert isinstance(again, Claim) and again.method is Method.LORA
    assert again.adjustment == Adjustment(micro_batch=2, accumulation=8, gradient_checkpointing=False), (
        "with room for its own rows, too"
    )
    timed.attempts.finish(again, Reason.OUT_OF_MEMORY, "out of memory", Progress())
    assert timed.jobs.get(long).methods == ["lora", "qlora"], "it may begin again rather than never end"


def test_a_job_does_not_take_its_card_back_where_less_is_predicted_of_it_than_its_trainer_measures(lab: Lab) -> None:
    """Of nothing like it anything was measured: by its row it would be an hour."""
    short = lab.short(left_s=2 * HOURS, user="ada")
    assert lab.store.cards.preempt() == (lab.job_id,)
    lab.give_way()
    assert lab.store.jobs.get(lab.job_id).work_left_s == 9 * HOURS
    assert lab.take().job_id == short


def test_a_job_whose_user_is_beyond_a_quota_keeps_its_card(lab: Lab) -> None:
    """It could not come back."""
    lab.store.usage.set_quota("ada", card_hours=0.1, window_s=30 * 86400, soft=False)
    lab.short()
    assert lab.store.cards.preempt() == ()


def test_a_job_that_never_yields_makes_none_yield(lab: Lab) -> None:
    lab.short(preemptible=False)
    assert lab.store.cards.preempt() == ()
    lab.short(left_s=60.0, user="cyd")
    assert lab.store.cards.preempt() == (lab.job_id,), "it hides none that goes first"


def test_a_job_that_no_longer_waits_stops_none(lab: Lab) -> None:
    short = lab.short()
    lab.store.jobs.hold(short, "bob", "")
    assert lab.store.cards.preempt() == ()


def test_a_job_that_gave_way_keeps_what_out_of_memory_taught_the_attempt(timed: Store, clock: Clock) -> None:
    timed.cards.see(node_state(BOX, max_jobs=1, total=14 * GIB))
    forms, rows = {4: 40.0}, {"per_device_train_batch_size": 4}
    long = timed.jobs.submit(submission(lora=12, method="lora", roomy=forms, training=rows))
    claim = timed.attempts.claim(BOX)
    assert isinstance(claim, Claim) and claim.adjustment.micro_batch is None, "it begins with its own rows"
    kept = StoredCheckpoint(step=9, prefix=f"jobs/{long}/attempt-1/checkpoint-9", manifest_sha256="0" * 64)
    timed.attempts.keep_checkpoint(claim, kept)
    learned = Adjustment(micro_batch=2, accumulation=8)
    timed.attempts.beat(claim, Progress(stage=Stage.TRAINING, eta_seconds=9 * HOURS, adjustment=learned))
    timed.attempts.finish(claim, Reason.PREEMPTED, "gave way", Progress(step=9))
    again = timed.attempts.claim(BOX)
    assert isinstance(again, Claim) and again.job_id == long
    assert again.adjustment == learned, "with its own rows it would run out of memory again"


def test_a_job_that_begins_again_after_it_gave_way_may_take_any_of_its_methods(timed: Store, clock: Clock) -> None:
    lab = Lab(timed, clock, lora=12, qlora=4, method="auto")
    long, claim = lab.job_id, lab.claim
    assert claim.method is Method.LORA
    lab.beat()
    clock.forward(UNDISTURBED_S)
    lab.beat()
    short = lab.short()
    assert timed.cards.preempt() == (long,)
    kept = StoredCheckpoint(step=9, prefix=f"jobs/{long}/attempt-1/checkpoint-9", manifest_sha256="0" * 64)
    timed.attempts.keep_checkpoint(claim, kept)
    timed.attempts.finish(claim, Reason.PREEMPTED, "gave way", Progress(step=9))
    assert timed.jobs.get(long).methods == ["lora"]
    timed.jobs.cancel(short, "bob")
    claim = timed.attempts.claim(BOX)
    assert isinstance(claim, Claim)
    timed.attempts.finish(claim, Reason.DIVERGED, "diverged", Progress(step=12))
    timed.jobs.retry(long, "ada")
    assert timed.jobs.get(long).methods == ["lora", "qlora"], "its checkpoint is gone"


@pytest.mark.both
@pytest.mark.parametrize("change", ["cancelled", "held", "on another card"])
def test_a_stop_is_withdrawn_once_the_short_job_no_longer_needs_the_card(lab: Lab, change: str) -> None:
    short = lab.short()
    assert lab.store.cards.preempt() == (lab.job_id,)
    if change == "cancelled":
        lab.store.jobs.cancel(short, "bob")
    elif change == "held":
        lab.store.jobs.hold(short, "bob", "")
    else:
        lab.store.cards.see(node_state("owl:0", max_jobs=1, total=24 * GIB))
        assert isinstance(lab.store.attempts.claim("owl:0"), Claim)
    assert lab.beat() is None, "before any round"
    if change == "held":
        lab.store.jobs.release(short, "bob")
        assert lab.beat() == short, "it waits again, and nobody has withdrawn the stop yet"
        lab.store.jobs.hold(short, "bob", "")
    other = lab.short(user="cyd")
    assert lab.store.cards.preempt() == (lab.job_id,), "one round withdraws it, and asks for the next job"
    assert lab.beat() == other
    said = lab.text(lab.job_id)
    assert said.index(f"need not give way to job {short} any more") < said.index(f"asked to give way to job {other}")
    assert lab.store.jobs.get(lab.job_id).stops == 0, "it never stopped"


def test_a_stop_that_did_not_take_place_is_not_counted(lab: Lab) -> None:
    lab.short()
    assert lab.store.cards.preempt() == (lab.job_id,)
    lab.store.attempts.finish(lab.claim, Reason.DRAINED, "the worker is being stopped", Progress(step=6))
    assert lab.store.jobs.get(lab.job_id).stops == 0


def test_a_job_yields_only_after_a_time_that_is_worth_the_step_that_it_ends(lab: Lab) -> None:
    """A step of five minutes: the short one waits for its end, as the law must know."""
    told = Progress(stage=Stage.TRAINING, eta_seconds=9 * HOURS, step=7, trained_s=600.0, trained_steps=2)
    lab.store.attempts.beat(lab.claim, told)
    lab.short()
    assert lab.store.cards.preempt() == ()
    lab.clock.forward((300.0 + PREPARED_S + LEAVES_IN_S) / COST_SHARE - UNDISTURBED_S - 5)
    lab.beat()
    assert lab.store.cards.preempt() == ()
    lab.clock.forward(6)
    lab.beat()
    assert lab.store.cards.preempt() == (lab.job_id,)


def test_a_job_that_gave_way_and_whose_only_card_went_says_so_and_what_helps(timed: Store, clock: Clock) -> None:
    lab = Lab(timed, clock, lora=20, qlora=4, method="auto")
    lab.beat()
    kept = StoredCheckpoint(step=9, prefix=f"jobs/{lab.job_id}/attempt-1/checkpoint-9", manifest_sha256="0" * 64)
    timed.attempts.keep_checkpoint(lab.claim, kept)
    lab.give_way()
    timed.cards.see(node_state("owl:0", max_jobs=1, total=8 * GIB))
    timed.cards.forget(BOX)
    assert timed.attempts.claim("owl:0") is None
    said = " ".join(why_text(why(timed, lab.job_id, in_other_forms=False), PIPE).split())
    assert "needs 20.0 GiB, and the largest card has 8.0 GiB" in said
    assert "goes on from its checkpoint of step 9 with lora alone" in said
    helps = f"loractl submit --like {lab.job_id} --set method=qlora"
    assert helps in said, said
    with pytest.raises(UsageError, match="different training"):
        amendment(timed, lab.job_id, ["method=qlora"])


def test_gc_of_a_checkpoint_opens_the_methods_of_a_job_that_gave_way(timed: Store, clock: Clock) -> None:
    lab = Lab(timed, clock, lora=12, qlora=4, method="auto", max_retries=0)
    lab.beat()
    kept = StoredCheckpoint(step=9, prefix=f"jobs/{lab.job_id}/attempt-1/checkpoint-9", manifest_sha256="0" * 64)
    timed.attempts.keep_checkpoint(lab.claim, kept)
    lab.give_way()
    claim = lab.take()
    timed.attempts.finish(claim, Reason.TRAINER_ERROR, "it broke", Progress(step=12))
    row = timed.jobs.get(lab.job_id)
    assert row.status is Status.FAILED and row.checkpoint is not None and row.methods == ["lora"]
    timed.results.forget_checkpoint(lab.job_id)
    timed.jobs.retry(lab.job_id, "ada")
    assert timed.jobs.get(lab.job_id).methods == ["lora", "qlora"]


@pytest.mark.parametrize(("short_s", "yields"), [(200.0, True), (300.0, False), (900.0, False)])
def test_equal_jobs_do_not_yield_to_each_other_on_a_card_that_has_become_slow(
    timed: Store, clock: Clock, short_s: float, yields: bool
) -> None:
    """What slows the running one, other programs or jobs on its card, would slow the waiting one too."""
    lab = Lab(timed, clock)
    with Session(timed.engine) as session, session.begin():
        values = {"seconds_predicted": 1200.0, "predicted_by": Basis.LIKE}
        session.execute(update(Attempt).where(Attempt.job_id == lab.job_id).values(**values))
    clock.forward(800.0)
    lab.beat(4800.0 - 800.0)
    lab.short(short_s)
    assert timed.cards.preempt() == ((lab.job_id,) if yields else ())
