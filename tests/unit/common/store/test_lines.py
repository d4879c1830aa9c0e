"""The fleet and its lines as read from the database: cards, charges, drains, and jobs in the rule's order."""

from __future__ import annotations

import datetime as dt
import itertools
import operator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from loractl.common.job.method import Method, Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import Reason, Status
from loractl.common.placement.lines import Waiting, in_line
from loractl.common.placement.rule import RESERVE_AFTER_S, turns
from loractl.common.store.fleet import NODE_STALE_S, card_of, is_ready, waiting_of
from loractl.common.store.queries.backlog import line_up
from loractl.common.store.queries.cards.nodes import drained_targets, read_charges
from loractl.common.store.queries.lines import MOST_LINES, StoredQueue, lock_alike, read_order
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Base, DrainOrder, Job
from loractl.common.units import GIB

from ....databases import SQLITE_ALONE
from ...factories import EXAMPLES, NOON, PLENTY, RESULT, Clock, node_state, submission
from ...fleets import card, drained, in_seconds, running, waits

YES = {"nvlink": "yes"}


# --- cards ---


def test_a_card_has_what_its_node_says_and_what_runs_there() -> None:
    node = card("a:0", 48, margin=1, outside_bytes=3, max_jobs=4, labels=YES, user_limit=2, used={"5": 2 * GIB})
    found = card_of(node, [running(5, "a:0", 10, 60.0), running(6, "a:0", 8)], NOON, {})
    assert (found.total, found.margin, found.outside) == (48 * GIB, GIB, 3 * GIB)
    assert (found.capacity, found.taken, found.free, found.slots) == (44 * GIB, 18 * GIB, 26 * GIB, 2)
    assert (found.labels, found.user_limit, found.open, found.processor) == (frozenset(YES.items()), 2, True, False)
    first, second = found.running
    assert (first.job_id, first.user, first.reserved, first.used) == (5, "ada", 10 * GIB, 2 * GIB)
    assert (first.ends, second.ends, second.used) == (in_seconds(60), None, 0)


def test_a_job_of_an_older_version_without_a_reservation_has_the_whole_card() -> None:
    row = running(5, "a:0", 1)
    row.vram_reserved = None
    assert card_of(card("a:0", 24), [row], NOON, {}).free == 0


@pytest.mark.parametrize(
    ("changed", "is_open"),
    [
        ({}, True),
        ({"seen_at": in_seconds(-NODE_STALE_S)}, True),
        ({"seen_at": in_seconds(-NODE_STALE_S - 1)}, False),
        ({"draining": True}, False),
        ({"kind": "cpu"}, True),
    ],
)
def test_a_card_is_open_while_it_is_seen_and_its_worker_goes_on(changed: dict[str, Any], is_open: bool) -> None:
    assert card_of(card(**changed), [], NOON, {}).open is is_open


@pytest.mark.parametrize(("target", "is_open"), [("box", False), ("box:0", False), ("box:1", True), ("bo", True)])
def test_a_drain_closes_its_host_or_card_and_nothing_else(target: str, is_open: bool) -> None:
    assert card_of(card(), [], NOON, {target: drained(target)}).open is is_open


def test_a_drain_that_is_over_does_not_count(timed: Store, clock: Clock) -> None:
    for target, until in (("a", None), ("b", NOON + dt.timedelta(seconds=10)), ("c", NOON)):
        timed.cards.drain(target, "lena", "fan", until=until)
    with Session(timed.engine) as session:
        assert set(drained_targets(session, clock.now)) == {"a", "b"}
        clock.forward(10)
        assert set(drained_targets(session, clock.now)) == {"a"}
        order = drained_targets(session, clock.now)["a"]
        assert isinstance(order, DrainOrder) and (order.user, order.reason) == ("lena", "fan")


# --- charges ---


def test_use_counts_at_once_by_the_hour_and_half_as_much_a_day_later(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(submission(lora=8, method="lora"))
    timed.cards.see(node_state(total=24 * GIB))
    mine = timed.attempts.claim("box:0")
    assert isinstance(mine, Claim)

    def charges() -> dict[str, float]:
        with Session(timed.engine) as session:
            return read_charges(session, clock.now)

    assert charges() == {"ada": 8.0}, "as if it had run an hour"
    clock.forward(3 * 3600)
    assert charges() == {"ada": pytest.approx(24.0)}
    timed.attempts.finish(mine, Reason.OK, "done", Progress(), RESULT)
    assert charges() == {"ada": pytest.approx(24.0)}
    clock.forward(24 * 3600)
    assert charges() == {"ada": pytest.approx(12.0)}


def test_a_view_has_everything_of_one_moment(timed: Store, clock: Clock) -> None:
    timed.cards.see(node_state("b:0", total=24 * GIB))
    timed.cards.see(node_state("a:0", total=8 * GIB))
    timed.cards.drain("b", "lena", "fan")
    job_id = timed.jobs.submit(submission(lora=20, qlora=6))
    view = timed.cards.fleet()
    assert (view.now, list(view.cards), list(view.nodes)) == (NOON, ["a:0", "b:0"], ["a:0", "b:0"])
    assert view.drain_of("b:0") is not None and view.drain_of("a:0") is None
    (decision,) = view.decisions
    assert decision.placed is not None
    assert (decision.placed.job.job_id, decision.placed.node, decision.placed.method) == (job_id, "a:0", Method.QLORA)
    mine = timed.attempts.claim("a:0")
    assert isinstance(mine, Claim)
    after = timed.cards.fleet()
    assert (list(after.running), after.decisions, after.charges) == ([job_id], (), {"ada": 6.0})


# --- lines ---


@pytest.mark.parametrize(("until", "methods"), [(1, [Method.LORA]), (0, list(Method)[1:]), (None, list(Method)[1:])])
def test_qlora_is_not_permitted_while_a_job_waits_for_lora(until: float | None, methods: list[Method]) -> None:
    row = waits(lora_until=None if until is None else in_seconds(until))
    assert list(waiting_of(vars(row), NOON).methods) == methods
    assert list(Method)[1:] == [Method.LORA, Method.QLORA]


def test_required_labels_and_any_user_name_come_back_from_the_key(store: Store) -> None:
    for user in ("ada", "b|c", '{"x": 1}', "Ünï", "a b"):
        for labels in ({}, YES, {"a|b": 'c"|}'}):
            job_id = store.jobs.submit(submission(user=user, resources={"node_labels": labels}))
            found = waiting_of(vars(store.jobs.get(job_id)), NOON)
            assert (found.user, found.requires) == (user, frozenset(labels.items()))


gibs = st.sampled_from([None, 0.5, 1, 1.05, 3, 7.9, 8, 23, 60])
alike = st.fixed_dictionaries(
    {
        "lora": gibs,
        "qlora": gibs,
        "user": st.sampled_from(["ada", "bob", "{"]),
        "priority": st.sampled_from([0, 0, 7, -3, 100]),
        "method": st.sampled_from(["auto", "lora", "qlora"]),
        "labels": st.sampled_from([{}, {}, YES]),
    }
)
own = st.fixed_dictionaries(
    {
        "checkpoint_s": st.sampled_from([None, None, None, 60.0, 5000.0, 40_000.0]),
        "work_left_s": st.sampled_from([3600.0, 60.0]),
    }
)
queues = st.lists(alike, min_size=1, max_size=4).flatmap(
    lambda some: st.lists(st.builds(operator.or_, st.sampled_from(some), own), min_size=5, max_size=14)
)
"""Jobs of four lines at most, but for those that have run: so most lines have several."""


ROOM = 6 * GIB
"""Some of these jobs need more."""


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    queue=queues,
    at_once=st.sampled_from([1, 3, 16]),
    charges=st.dictionaries(st.sampled_from(["ada", "bob", "cyd"]), st.floats(0, 3)),
)
def test_lines_in_the_database_give_what_lines_in_a_list_give(
    queue: list[dict[str, Any]], at_once: int, charges: dict[str, float], timed: Store
) -> None:
    with Session(timed.engine) as session, session.begin():
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    fill(timed, queue)
    jobs = sorted(timed.jobs.matching(), key=lambda job: job.job_id)
    listed = {job.job_id: waiting_of(vars(job), NOON) for job in jobs}
    lines: dict[str, list[Waiting]] = {}
    for job in jobs:
        lines.setdefault(job.queue_key, []).append(listed[job.job_id])
    in_order = sorted(listed.values(), key=turns(charges))
    with Session(timed.engine) as session:
        stored = StoredQueue(session, NOON, at_once)
        firsts = [one for line in lines.values() for one in (min(line, key=in_line), line[0])]
        assert sorted(stored.firsts(), key=in_line) == sorted({job.job_id: job for job in firsts}.values(), key=in_line)
        for line in lines.values():
            assert len({job.line for job in line}) == 1
            for job, following in itertools.pairwise([*sorted(line, key=in_line), None]):
                assert stored.after(job) == following
        assert {job.job_id for job in stored.firsts(also=listed.keys())} == listed.keys()
        roomy = StoredQueue(session, NOON).firsts(room=ROOM)
        assert {job.job_id: job for job in roomy} == {j.job_id: j for j in firsts if (j.bound or 0) <= ROOM}
        later = NOON + dt.timedelta(seconds=RESERVE_AFTER_S)
        aged = {job.job_id for job in StoredQueue(session, later).firsts()}
        assert {job.job_id for job in StoredQueue(session, later).firsts(room=ROOM)} == aged
        assert read_order(session, NOON, charges, 10) == in_order[:10]


@SQLITE_ALONE
def test_to_go_from_line_to_line_takes_as_long_however_many_jobs_a_line_has(timed: Store) -> None:
    """SQLite seeks a pair of columns, and would walk over all jobs that have just this pair."""
    for size in (4, 8):
        timed.jobs.submit(submission(lora=size, method="lora"))
    columns = ", ".join(f'"{column.name}"' for column in Job.__table__.columns if column.name != "job_id")

    def steps() -> int:
        """Of SQLite's machine, in hundreds."""
        with Session(timed.engine) as session:
            driver: Any = session.connection().connection.driver_connection
            taken = list[None]()
            driver.set_progress_handler(lambda: taken.append(None), 100)
            found = StoredQueue(session, NOON).firsts()
            driver.set_progress_handler(None, 0)
        assert {job.need.lora for job in found} == {4 * GIB, 8 * GIB}
        return len(taken)

    few = steps()
    with timed.engine.begin() as connection:
        for _ in range(9):
            connection.exec_driver_sql(f"INSERT INTO jobs ({columns}) SELECT {columns} FROM jobs")
    assert steps() <= few + 2


def test_of_a_user_the_smallest_of_many_lines_are_read_and_other_users_lose_nothing(timed: Store) -> None:
    for number in range(MOST_LINES + 8):
        timed.jobs.submit(submission(lora=100 - number, method="lora"))
    urgent = timed.jobs.submit(submission(lora=200, method="lora", priority=1))
    theirs = {timed.jobs.submit(submission(lora=number, method="lora", user="bob")) for number in (50, 60)}
    with Session(timed.engine) as session:
        queue = StoredQueue(session, NOON)
        found = queue.firsts()
        assert {job.job_id for job in queue.beyond(99 * GIB)} == set(range(2, 10))
    mine = {job.job_id for job in found if job.user == "ada"}
    assert {job.job_id for job in found if job.user == "bob"} == theirs
    assert mine == {urgent, *range(10, MOST_LINES + 9)}, "the urgent one, and those that need least"


@pytest.mark.parametrize("age_s", [0, 2 * 86400])
def test_any_number_of_lines_that_can_t_start_keep_no_card_from_those_behind_them(
    timed: Store, clock: Clock, age_s: int
) -> None:
    for number in range(MOST_LINES + 8):
        timed.jobs.submit(submission(lora=40 + number, method="lora", priority=1))
    small = timed.jobs.submit(submission(lora=8, method="lora"))
    clock.forward(age_s)
    timed.cards.see(node_state(total=24 * GIB))
    assert timed.jobs.has_unfinished(24 * GIB, {}) and not timed.jobs.has_unfinished(7 * GIB, {})
    claim = timed.attempts.claim("box:0")
    assert isinstance(claim, Claim) and claim.job_id == small


@pytest.mark.parametrize(
    "ways", [Ways(), Ways(gangs=(SharedNeed(cards=2, parallel=Parallel.DATA, need=Need(lora=GIB, qlora=GIB)),))]
)
def test_the_next_of_a_line_are_read_as_their_rows_say(store: Store, ways: Ways) -> None:
    """Also what no key says: how several cards divide a job."""
    for _ in range(3):
        store.jobs.submit(replace(submission(resources={"node_labels": YES}), ways=ways))
    first, *others = (waiting_of(vars(job), NOON) for job in sorted(store.jobs.matching(), key=lambda job: job.job_id))
    with Session(store.engine) as session:
        assert StoredQueue(session, store.now()).behind(first) == others


def fill(store: Store, queue: list[dict[str, Any]]) -> None:
    for row in queue:
        keys = {key: value for key, value in row.items() if key not in ("labels", "checkpoint_s", "work_left_s")}
        job_id = store.jobs.submit(submission(**keys, resources={"node_labels": row["labels"]}))
        with Session(store.engine) as session, session.begin():
            job = session.get_one(Job, job_id)
            job.checkpoint_s, job.work_left_s = row["checkpoint_s"], row["work_left_s"]
            job.attempt = 0 if job.checkpoint_s is None else 1
            line_up(job, row["labels"], NOON)


def test_a_row_is_ready_by_one_rule_in_sql_and_in_values(timed: Store) -> None:
    """Status, a person's hold, and a pause: as the lines, the counts and the hints read them, and a locked row."""
    pauses = (None, NOON - dt.timedelta(seconds=1), NOON, NOON + dt.timedelta(seconds=1))
    kinds = list(itertools.product((Status.QUEUED, Status.RUNNING, Status.FAILED), (False, True), pauses))
    numbers = [timed.jobs.submit(submission()) for _ in kinds]
    with Session(timed.engine) as session, session.begin():
        for number, (status, held, not_before) in zip(numbers, kinds, strict=True):
            changed = {"status": status, "held": held, "not_before": not_before}
            session.execute(update(Job).where(Job.job_id == number).values(changed))
    ready = {job.job_id for job in timed.jobs.matching() if is_ready(job, NOON)}
    queued = [number for number, (status, *_) in zip(numbers, kinds, strict=True) if status is Status.QUEUED]
    assert ready == {queued[0], queued[1], queued[2]}, "free of a hold and a pause"
    assert {job.job_id for job in timed.jobs.ready(99)} == ready
    assert Store(timed.engine, lambda: NOON).jobs.counts()[Status.QUEUED, "ready"] == len(ready)


@pytest.mark.both
def test_who_looks_at_a_line_still_finds_its_next_job_once_another_card_has_taken_the_first(store: Store) -> None:
    """A start changes the job's key, and on PostgreSQL each statement sees what others have committed by then."""
    first, second = (store.jobs.submit(submission()) for _ in range(2))
    store.cards.see(node_state("box:0", total=PLENTY, max_jobs=64))
    with Session(store.engine) as session:
        now = store.cards.fleet().now
        queue = StoredQueue(session, now, at_once=1)
        (seen,) = [job for job in queue.firsts() if job.job_id == first]
        session.rollback()
        assert isinstance(claimed := store.attempts.claim("box:0"), Claim) and claimed.job_id == first
        assert (after := queue.after(seen)) is not None and after.job_id == second
        session.rollback()
        with Session(store.engine) as other:
            if session.get_bind().dialect.name == "postgresql":  # as a beat has it
                other.execute(select(Job).where(Job.job_id == first).with_for_update())
                with store.begin(read_only=False) as tx:
                    assert (locked := lock_alike(tx, seen, now)) is not None and locked[0].job_id == second
