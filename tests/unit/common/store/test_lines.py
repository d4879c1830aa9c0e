"""The fleet and its lines as read from the database: cards, charges, drains, and jobs in the rule's order."""

from __future__ import annotations

import datetime as dt
import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, update
from sqlalchemy.orm import Session

from loractl.common.job.method import Method, Need
from loractl.common.job.status import Reason, Status
from loractl.common.placement.lines import ListedLine, Openings, Stay, Waiting, widest
from loractl.common.placement.rule import OLDEST_FIRST_AFTER_S
from loractl.common.store.fleet import NODE_STALE_S, card_of, is_ready, waiting_of
from loractl.common.store.queries.cards.nodes import drained_targets, read_charges
from loractl.common.store.queries.lines import read_levels, read_oldest, read_order
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Base, DrainOrder, Job
from loractl.common.units import GIB

from ...factories import EXAMPLES, NOON, RESULT, Clock, node_state, submission
from ...fleets import card, drained, in_seconds, levels_of, running, waits
from ..placement.scenes import a_job

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
rows = st.fixed_dictionaries(
    {
        "lora": gibs,
        "qlora": gibs,
        "user": st.sampled_from(["ada", "bob", "{"]),
        "priority": st.sampled_from([0, 0, 7, -3, 100]),
        "method": st.sampled_from(["auto", "lora", "qlora"]),
        "labels": st.sampled_from([{}, {}, YES]),
        "checkpoint_s": st.sampled_from([None, None, 60.0, 5000.0, 40_000.0]),
    }
)


@st.composite
def stays(draw: st.DrawFn, gpu: float, labels: set[frozenset[tuple[str, str]]]) -> frozenset[Stay] | None:
    """Cards of two boxes, one with the label and one without; some of the cards stay for good."""
    if draw(st.booleans()):
        return None
    sizes = st.sampled_from([size for size in (0.5, 1, 8, 23, 64) if size <= gpu] or [0])
    found = draw(st.lists(st.tuples(sizes, st.sampled_from([600.0, 9000.0, 90_000.0, math.inf])), max_size=4))
    return frozenset(
        Stay(
            above=draw(st.sampled_from([-1, -1, 8 * GIB])),
            bytes=int(size * GIB),
            whole=draw(st.booleans()),
            labels=draw(st.sampled_from(sorted(labels, key=len))),
            left_s=left_s,
            unmeasured=left_s > 5000,
        )
        for size, left_s in found
    )


@st.composite
def shrinking(draw: st.DrawFn) -> list[Openings]:
    """What could start, less from one to the next."""
    found, gpu, high = [], 64.0, 64.0
    unknown, labels = True, {frozenset(), frozenset(YES.items())}
    low = draw(st.sampled_from([0, 8, 24]))
    for _ in range(draw(st.integers(1, 4))):
        gpu, high = min(gpu, draw(st.sampled_from([0, 1, 8, 23, 64]))), min(high, draw(st.sampled_from([0, 30, 64])))
        unknown = unknown and (gpu > 0 or high > low) and draw(st.booleans())  # on a card that has room
        labels = labels - {draw(st.sampled_from([None, None, frozenset(YES.items())]))}
        processor = (int(low * GIB), int(high * GIB))
        found.append(Openings(gpu=int(gpu * GIB), processor=processor, unknown=unknown, labels=frozenset(labels)))
    first = draw(stays(64, {frozenset(), frozenset(YES.items())}))
    kept = [first]
    for _ in found[1:]:
        kept.append(
            None if kept[-1] is None else frozenset(one for one in sorted(kept[-1], key=repr) if draw(st.booleans()))
        )
    return [replace(one, stays=some) for one, some in zip(found, kept, strict=True)]


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(queue=st.lists(rows, max_size=12), openings=shrinking(), each=st.integers(0, 3))
def test_lines_in_the_database_give_what_lines_in_a_list_give(
    queue: list[dict[str, Any]], openings: list[Openings], each: int, timed: Store, clock: Clock
) -> None:
    with Session(timed.engine) as session, session.begin():
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    clock.now = NOON - dt.timedelta(seconds=OLDEST_FIRST_AFTER_S)
    fill(timed, queue)
    clock.now = NOON
    listed = [waiting_of(vars(job), NOON) for job in sorted(timed.jobs.matching(), key=lambda j: j.job_id)]
    with Session(timed.engine) as session:
        stored_levels, plain_levels = list(read_levels(session, NOON)), list(levels_of(listed))
        assert [set(level) for level in stored_levels] == [set(level) for level in plain_levels]
        for stored, plain in zip(stored_levels, plain_levels, strict=True):
            for user in plain:
                assert _all(stored[user], openings, each) == _all(plain[user], openings, each)
        assert _all(read_oldest(session, NOON), openings, each) == _all(ListedLine(listed), openings, each)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    queue=st.lists(rows, max_size=14),
    openings=shrinking(),
    each=st.integers(0, 3),
    form=st.tuples(st.integers(0, 13), st.integers(1, 40)),
    charges=st.dictionaries(st.sampled_from(["ada", "bob", "cyd"]), st.floats(0, 3)),
)
def test_the_rules_order_and_a_job_in_another_form_are_those_of_a_list(
    queue: list[dict[str, Any]], openings: list[Openings], each: int, form: tuple[int, int],
    charges: dict[str, float], timed: Store,
) -> None:  # fmt: skip
    with Session(timed.engine) as session, session.begin():
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    fill(timed, queue)
    listed = [waiting_of(vars(job), NOON) for job in sorted(timed.jobs.matching(), key=lambda j: j.job_id)]
    in_order = sorted(listed, key=lambda job: (-job.priority, charges.get(job.user, 0.0), job.job_id))
    with Session(timed.engine) as session:
        assert read_order(session, NOON, charges, 10) == in_order[:10]
        if not listed:
            return
        place, size = form
        changed = replace(listed[place % len(listed)], need=Need(lora=size * GIB, qlora=size * GIB))
        others = [job for job in listed if job.job_id != changed.job_id]
        plain = levels_of(sorted([*others, changed], key=lambda job: job.job_id))
        for stored_level, plain_level in zip(read_levels(session, NOON, changed), plain, strict=True):
            for user in plain_level:
                assert _all(stored_level[user], openings, each) == _all(plain_level[user], openings, each)


def fill(store: Store, queue: list[dict[str, Any]]) -> None:
    for row in queue:
        keys = {key: value for key, value in row.items() if key not in ("labels", "checkpoint_s")}
        job_id = store.jobs.submit(submission(**keys, resources={"node_labels": row["labels"]}))
        with store.engine.begin() as connection:
            connection.execute(update(Job).where(Job.job_id == job_id).values(checkpoint_s=row["checkpoint_s"]))


@given(stays(64, {frozenset(), frozenset(YES.items())}), st.lists(rows, max_size=8), st.integers(1, 3))
def test_a_few_bounds_of_time_leave_out_no_job_that_many_admit(
    many: frozenset[Stay] | None, queue: list[dict[str, Any]], most: int
) -> None:
    jobs = [a_job(n, row["lora"], checkpoint_s=row["checkpoint_s"]) for n, row in enumerate(queue)]
    few = widest(many or (), frozenset(), most)
    assert len(few) <= most
    for job in jobs:
        admitted = any(stay.admits(job) for stay in many or ())
        assert any(stay.admits(job) for stay in few) or not admitted
        assert most < 3 or len(few) == most or admitted == any(stay.admits(job) for stay in few)


def test_before_a_day_has_passed_no_job_goes_first_for_its_age(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    every = Openings(gpu=64 * GIB, processor=(0, 0), unknown=True, labels=frozenset({frozenset()}))
    for seconds, first in ((OLDEST_FIRST_AFTER_S - 1, []), (1, [job_id])):
        clock.forward(seconds)
        with Session(timed.engine) as session:
            assert [job.job_id for job in _all(read_oldest(session, clock.now), [every], 0) if job] == first


def test_of_many_young_jobs_that_no_card_stays_for_one_is_read(timed: Store, clock: Clock) -> None:
    """They need labels that only a card has which stops soon; in the database's bounds they pass for the other's."""
    fill(timed, [JOB_WITH_LABEL])
    clock.forward(OLDEST_FIRST_AFTER_S - 60)
    fill(timed, [JOB_WITH_LABEL] * 20)
    clock.forward(120)
    stay = partial(Stay, above=-1, bytes=64 * GIB, whole=False)
    soon = stay(labels=frozenset(YES.items()), left_s=600.0, unmeasured=False)
    forever = stay(labels=frozenset(), left_s=math.inf, unmeasured=True)
    labels = frozenset({frozenset(), frozenset(YES.items())})
    every = Openings(gpu=64 * GIB, processor=(0, 0), unknown=True, labels=labels, stays=frozenset({soon, forever}))
    statements: list[str] = []
    with Session(timed.engine) as session:
        event.listen(timed.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
        assert read_oldest(session, clock.now).next(every) is None
    assert len(statements) <= 4, "the first, the old one, and a young one"


JOB_WITH_LABEL = {
    "lora": 1, "qlora": 1, "user": "ada", "priority": 0, "method": "auto", "labels": YES, "checkpoint_s": 5000.0,
}  # fmt: skip


def _all(line: Any, openings: list[Openings], each: int) -> list[Waiting | None]:
    """Some jobs with each of the openings, and with the last one all that are left."""
    found = [line.next(one) for one in openings for _ in range(each)]
    while (job := line.next(openings[-1])) is not None:
        found.append(job)
    return found


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
