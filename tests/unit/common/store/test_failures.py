"""The lab's failures in the database: what a retry avoids, when a card or a box is closed, when a job is held."""

from __future__ import annotations

import datetime as dt

import pytest

from loractl.common.job.status import LAB_FAILURE_LIMIT, LAB_RETRY_DELAY_S, Reason, Status
from loractl.common.job.sweep import NewSweep
from loractl.common.settings import LEASE_S
from loractl.common.store.queries.endings import AVOIDED_S, WITHOUT_BASE_S
from loractl.common.store.records import Claim, Progress, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.common.units import GIB

from ....databases import SQLITE_ALONE
from ...factories import RESULT, Clock, node_state, submission

NOTHING = Progress()


def online(store: Store, *nodes: str, total: int = 24) -> None:
    for node in nodes:
        store.cards.see(node_state(node, total=total * GIB))


def start(store: Store, node: str) -> Claim:
    """The node takes a job, as if the others did not answer."""
    claim = store.attempts.claim(node, distrusted=frozenset(row.node for row in store.cards.nodes()))
    assert isinstance(claim, Claim), f"{node} got {claim}"
    return claim


def fail(store: Store, node: str, reason: Reason) -> None:
    """An attempt of the node ends so."""
    end(store, start(store, node), reason)


def end(store: Store, claim: Claim, reason: Reason) -> None:
    store.attempts.finish(claim, reason, f"because of {reason.value}", NOTHING, RESULT if reason is Reason.OK else None)


@SQLITE_ALONE
@pytest.mark.parametrize("reason", [Reason.GPU_ERROR, Reason.WORKER_LOST, Reason.KILLED])
def test_a_retry_avoids_the_card_that_failed_it(timed: Store, clock: Clock, reason: Reason) -> None:
    online(timed, "a:0", "a:1")
    job_id = timed.jobs.submit(submission())
    fail(timed, "a:0", reason)
    clock.forward(LAB_RETRY_DELAY_S)
    assert timed.attempts.claim("a:0") is None, "nothing is left for it: the job is no more its own"
    other = timed.attempts.claim("a:1")
    assert isinstance(other, Claim)
    assert other.job_id == job_id


@SQLITE_ALONE
@pytest.mark.parametrize("reason", [Reason.DISK_FULL, Reason.STORE_FAILED])
def test_a_retry_avoids_the_box_whose_disk_or_network_failed_it(timed: Store, clock: Clock, reason: Reason) -> None:
    online(timed, "a:0", "a:1", "b:0")
    timed.jobs.submit(submission(max_retries=0))
    fail(timed, "a:0", reason)
    clock.forward(LAB_RETRY_DELAY_S)
    assert [timed.attempts.claim(node) for node in ("a:0", "a:1")] == [None, None]
    assert isinstance(timed.attempts.claim("b:0"), Claim)


@pytest.mark.parametrize(
    ("dtype", "showed"), [("auto", ("9.0", "7.5")), ("bfloat16", ("9.0", "7.5")), ("auto", (True, False))]
)
def test_a_retry_waits_for_a_card_of_its_checkpoint_s_number_format_unless_the_job_names_one(
    timed: Store, dtype: str, showed: tuple[str | bool, str | bool]
) -> None:
    kind, what = ("cpu", "bf16") if isinstance(showed[0], bool) else ("nvml", "capability")
    new, old = (
        node_state(name, kind=kind, self_test={what: said}) for name, said in zip(("a:0", "b:0"), showed, strict=True)
    )
    timed.cards.see(new)
    job_id = timed.jobs.submit(submission(training={"dtype": dtype}))
    claim, kept = start(timed, "a:0"), StoredCheckpoint(step=5, prefix="jobs/1/checkpoints/1-5")
    assert timed.attempts.keep_checkpoint(claim, kept)
    assert timed.jobs.get(job_id).begun_bf16 is (True if dtype == "auto" else None)
    end(timed, claim, Reason.DRAINED)
    timed.cards.see(old)
    other = timed.jobs.submit(submission(priority=1))
    assert start(timed, "a:0").job_id == other
    if dtype == "auto":
        assert timed.attempts.claim("b:0") is None, "the busy card takes its format"
        timed.cards.drain("a:0", "lena", "repair")
    again = timed.attempts.claim("b:0")
    assert isinstance(again, Claim) and again.job_id == job_id
    timed.attempts.beat(again, Progress(withdrawn=kept.prefix))
    assert timed.jobs.get(job_id).begun_bf16 is None


def test_it_takes_the_card_that_failed_it_where_no_other_could_hold_it_and_after_half_an_hour(
    timed: Store, clock: Clock
) -> None:
    online(timed, "a:0")
    online(timed, "b:0", total=3)
    timed.jobs.submit(submission(method="lora"))
    fail(timed, "a:0", Reason.WORKER_LOST)
    again = timed.attempts.claim("a:0")
    assert isinstance(again, Claim), "b:0 is too small"
    end(timed, again, Reason.WORKER_LOST)
    online(timed, "b:0")
    assert timed.attempts.claim("a:0") is None
    clock.forward(AVOIDED_S)
    online(timed, "a:0")
    assert isinstance(timed.attempts.claim("a:0"), Claim), "b:0 has not come back"


def test_half_an_hour_later_it_does_not_wait_for_a_busy_card(timed: Store, clock: Clock) -> None:
    online(timed, "a:0", "b:0")
    timed.jobs.submit(submission())
    fail(timed, "a:0", Reason.GPU_ERROR)
    timed.jobs.submit(submission(user="bob"))
    long = start(timed, "b:0")
    for seconds, free in ((AVOIDED_S - 1, False), (1, True)):
        clock.forward(seconds)
        assert timed.attempts.beat(long, NOTHING).accepted
        online(timed, "a:0", "b:0")
        assert isinstance(timed.attempts.claim("a:0"), Claim) is free


def test_a_job_waits_for_the_busy_box_that_has_its_base(timed: Store, clock: Clock) -> None:
    online(timed, "a:0", "b:0", "c:0")
    timed.jobs.submit(submission(user="bob"))
    long = start(timed, "c:0")
    job_id = timed.jobs.submit(submission())
    for node in ("a:0", "b:0"):
        fail(timed, node, Reason.BASE_MISSING)
        clock.forward(LAB_RETRY_DELAY_S)
    for seconds in (AVOIDED_S, WITHOUT_BASE_S - AVOIDED_S - 5 * LAB_RETRY_DELAY_S):
        clock.forward(seconds)
        assert timed.attempts.beat(long, NOTHING).accepted
        online(timed, "a:0", "b:0", "c:0")
        assert [timed.attempts.claim(node) for node in ("a:0", "b:0")] == [None, None]
    assert (timed.jobs.get(job_id).held, timed.jobs.get(job_id).lab_failures) == (False, 0)
    timed.jobs.submit(submission())
    assert isinstance(timed.attempts.claim("a:0"), Claim), "the boxes take the jobs of others"


def test_a_base_that_is_on_no_box_holds_its_job_and_closes_no_box(timed: Store, clock: Clock) -> None:
    nodes = ("a:0", "b:0")
    online(timed, *nodes)
    jobs = [timed.jobs.submit(submission(user=user)) for user in ("ada", "bob", "cyd")]
    for job_id in jobs:
        for number in range(len(nodes) + LAB_FAILURE_LIMIT):
            assert not timed.jobs.get(job_id).held, "each box was looked at once, and then three times in a row"
            fail(timed, nodes[number % 2], Reason.BASE_MISSING)
            clock.forward(LAB_RETRY_DELAY_S)
            online(timed, *nodes)
        row = timed.jobs.get(job_id)
        assert (row.held, row.retries_used) == (True, 0)
        assert row.message == (
            "held: its base model was missing on the boxes that took it; the last on a:0: because of base_missing"
        )
    assert not timed.cards.drains()
    assert timed.jobs.release(jobs[0], "bob").avoids is None


@SQLITE_ALONE
def test_a_finished_result_keeps_its_box(timed: Store, clock: Clock) -> None:
    """What is stored there need not be trained again."""
    online(timed, "a:0", "b:0")
    timed.jobs.submit(submission())
    claim = start(timed, "a:0")
    timed.attempts.beat(claim, Progress(result_host="a"))
    end(timed, claim, Reason.STORE_FAILED)
    clock.forward(LAB_RETRY_DELAY_S)
    assert isinstance(timed.attempts.claim("a:0"), Claim)


@SQLITE_ALONE
def test_two_gpu_errors_in_a_row_close_the_card_and_undrain_opens_it(timed: Store, clock: Clock) -> None:
    online(timed, "a:0", "a:1")
    first, second = timed.jobs.submit(submission()), timed.jobs.submit(submission(user="bob"))
    fail(timed, "a:0", Reason.GPU_ERROR)
    assert timed.cards.drains() == {}
    fail(timed, "a:0", Reason.GPU_ERROR)
    (order,) = timed.cards.drains().values()
    assert (order.target, order.user, order.until, order.now) == ("a:0", "loractl", None, False)
    assert order.reason == (
        f"gpu_error in jobs {first} and {second}, the last: because of gpu_error; check it, then loractl undrain a:0"
    )
    assert timed.jobs.events(second)[-2].text == f"a:0 takes no more jobs: {order.reason}"
    clock.forward(LAB_RETRY_DELAY_S)
    assert timed.attempts.claim("a:0") is None

    assert timed.cards.end_drain("a:0")
    timed.jobs.submit(submission(user="cyd"))
    fail(timed, "a:0", Reason.GPU_ERROR)
    assert timed.cards.drains() == {}, "a person opened it: it is counted from there on"


@SQLITE_ALONE
def test_a_job_that_ends_well_begins_a_new_row(timed: Store) -> None:
    online(timed, "a:0", "b:0")
    for user, reason in (("ada", Reason.GPU_ERROR), ("bob", Reason.OK), ("cyd", Reason.GPU_ERROR)):
        timed.jobs.submit(submission(user=user))
        fail(timed, "a:0", reason)
    assert timed.cards.drains() == {}


@SQLITE_ALONE
def test_a_job_that_ends_well_on_any_card_of_a_box_clears_its_disk(timed: Store) -> None:
    online(timed, "a:0", "a:1", "b:0")
    for user, reason in (("ada", None), ("bob", None), ("cyd", Reason.OK), ("dan", None)):
        timed.jobs.submit(submission(user=user))
        fail(timed, "a:0" if reason is None else "a:1", reason or Reason.DISK_FULL)
    assert timed.cards.drains() == {}


@SQLITE_ALONE
def test_the_last_open_card_is_never_closed(timed: Store, clock: Clock) -> None:
    """A processor does not stand in for the last GPU."""
    online(timed, "a:0")
    timed.cards.see(node_state("b:cpu", total=64 * GIB, kind="cpu"))
    for user in ("ada", "bob", "cyd"):
        timed.jobs.submit(submission(user=user))
        fail(timed, "a:0", Reason.GPU_ERROR)
    assert timed.cards.drains() == {}
    online(timed, "c:0")
    timed.jobs.submit(submission(user="dan"))
    clock.forward(1)
    fail(timed, "a:0", Reason.GPU_ERROR)
    assert set(timed.cards.drains()) == {"a:0"}, "now another is open"


@SQLITE_ALONE
@pytest.mark.parametrize("reason", [Reason.DISK_FULL, Reason.STORE_FAILED])
def test_a_box_that_fails_three_jobs_is_closed_with_all_its_cards(timed: Store, reason: Reason) -> None:
    online(timed, "a:0", "a:1", "b:0")
    for node in ("a:0", "a:1", "a:0"):
        assert timed.cards.drains() == {}
        timed.jobs.submit(submission(max_retries=0))
        fail(timed, node, reason)
    (order,) = timed.cards.drains().values()
    assert order.target == "a"
    assert order.reason.startswith(f"{reason.value} in jobs 1, 2 and 3, the last: because of {reason.value};")
    assert all(row.status is Status.QUEUED and row.retries_used == 0 for row in timed.jobs.matching())


@SQLITE_ALONE
def test_a_store_that_fails_several_boxes_closes_none(timed: Store) -> None:
    online(timed, "a:0", "b:0", "c:0")
    for node in ("a:0", "b:0", "a:0", "b:0", "a:0", "b:0"):
        timed.jobs.submit(submission())
        fail(timed, node, Reason.STORE_FAILED)
    assert timed.cards.drains() == {}


@SQLITE_ALONE
def test_one_sweep_closes_no_card_and_neither_does_one_job(timed: Store, clock: Clock) -> None:
    online(timed, "a:0", "b:0")
    members = [submission(lora=20, qlora=20) for _ in range(4)]
    timed.sweeps.submit(NewSweep(name="a", varied={"lora.r": "4,8"}), members)
    for _ in members:
        fail(timed, "a:0", Reason.GPU_ERROR)
    assert timed.cards.drains() == {}


@SQLITE_ALONE
def test_a_user_whose_jobs_fail_on_every_card_closes_none(timed: Store) -> None:
    online(timed, "a:0", "b:0", "c:0")
    for node in ("a:0", "b:0", "c:0") * 2:
        timed.jobs.submit(submission())
        fail(timed, node, Reason.GPU_ERROR)
    assert timed.cards.drains() == {}
    timed.jobs.submit(submission(user="bob"))
    fail(timed, "b:0", Reason.GPU_ERROR)
    assert set(timed.cards.drains()) == {"b:0"}, "another user's job failed there too"


@SQLITE_ALONE
def test_a_power_cut_closes_no_box(timed: Store, clock: Clock) -> None:
    """It ends all jobs at once; the third that ends one does, within a day."""
    for cut in range(3):
        timed.cards.see(node_state("a:0", total=96 * GIB, max_jobs=4))
        online(timed, "b:0")
        for user in "abcd":
            timed.jobs.submit(submission(user=f"{user}{cut}", lora=20, qlora=20))
            start(timed, "a:0")
        assert len(timed.cards.arrive(node_state("a:0")).given_back) == 4
        assert set(timed.cards.drains()) == (set() if cut < 2 else {"a:0"})
        for row in timed.jobs.matching(statuses=[Status.QUEUED]):
            timed.jobs.cancel(row.job_id, "ada")
        clock.forward(3600)


@SQLITE_ALONE
def test_three_failures_of_the_lab_in_a_row_hold_a_job_with_the_reasons(timed: Store, clock: Clock) -> None:
    online(timed, "a:0")
    job_id = timed.jobs.submit(submission(max_retries=0))
    for reason in (Reason.DISK_FULL, Reason.WORKER_LOST, Reason.GPU_ERROR):
        assert not timed.jobs.get(job_id).held
        fail(timed, "a:0", reason)
        clock.forward(LAB_RETRY_DELAY_S)
        online(timed, "a:0")
    row = timed.jobs.get(job_id)
    assert (row.status, row.held, row.retries_used) == (Status.QUEUED, True, 0)
    assert row.message == "held: the lab failed it 3 times in a row; the last on a:0: because of gpu_error"
    released = timed.jobs.release(job_id, "ada")
    assert (released.held, released.avoids, released.lab_failures) == (False, None, 0)


@SQLITE_ALONE
def test_the_disk_of_the_only_box_holds_a_job_and_fails_none(timed: Store, clock: Clock) -> None:
    online(timed, "a:0")
    job_id = timed.jobs.submit(submission(max_retries=0))
    for _ in range(LAB_FAILURE_LIMIT):
        fail(timed, "a:0", Reason.DISK_FULL)
        assert timed.attempts.claim("a:0") is None, "not at once"
        clock.forward(LAB_RETRY_DELAY_S)
    assert "the disk of its box was full 3 times in a row; the last on a:0" in (timed.jobs.get(job_id).message or "")
    assert timed.attempts.claim("a:0") is None


def lose(store: Store, clock: Clock, *, kept: int | None = None, resumed: int | None = None) -> None:
    """A worker is lost whose attempt has stored a checkpoint, or went on from one of its box."""
    online(store, "a:0")
    claim = start(store, "a:0")
    store.attempts.beat(claim, Progress(resumed_from_step=resumed))
    if kept is not None:
        assert store.attempts.keep_checkpoint(claim, StoredCheckpoint(step=kept, prefix=f"jobs/1/checkpoints/1-{kept}"))
    clock.forward(LEASE_S + 1)
    store.attempts.reap()


def test_three_lost_workers_hold_no_job_that_comes_further_each_time(timed: Store, clock: Clock) -> None:
    """A long job on boxes that are rebooted now and then."""
    job_id = timed.jobs.submit(submission())
    for step in (10, 20, 30, 40, 50):
        lose(timed, clock, kept=step)
        assert not timed.jobs.get(job_id).held
    for step in (60, 70, 80):
        lose(timed, clock, resumed=step)
        assert not timed.jobs.get(job_id).held, "a checkpoint of the box's own counts too"
    for left in (2, 1):
        assert not timed.jobs.get(job_id).held, f"{left} more are needed"
        lose(timed, clock, kept=70)
    assert timed.jobs.get(job_id).held


def test_an_attempt_that_dies_before_it_resumed_is_no_progress(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    lose(timed, clock, kept=10)
    for _ in range(2):
        assert not timed.jobs.get(job_id).held
        lose(timed, clock)
    assert timed.jobs.get(job_id).held


def test_a_failure_of_yesterday_closes_nothing(timed: Store, clock: Clock) -> None:
    for user in ("ada", "bob"):
        online(timed, "a:0", "b:0")
        timed.jobs.submit(submission(user=user))
        fail(timed, "a:0", Reason.GPU_ERROR)
        clock.forward(dt.timedelta(days=1).total_seconds())
    assert timed.cards.drains() == {}


@SQLITE_ALONE
def test_what_a_person_drained_keeps_the_person_s_reason(timed: Store) -> None:
    online(timed, "a:0", "b:0")
    claims = []
    for user in ("ada", "bob"):
        timed.cards.see(node_state("a:0", total=48 * GIB, max_jobs=2))
        timed.jobs.submit(submission(user=user, lora=20, qlora=20))
        claims.append(start(timed, "a:0"))
    timed.cards.drain("a", "lena", "replacing a fan")
    for claim in claims:
        end(timed, claim, Reason.GPU_ERROR)
    assert [(order.target, order.user) for order in timed.cards.drains().values()] == [("a", "lena")]
