"""What was had of the cards, as people see it; an upgraded lab's past, and why a job waits beyond a quota."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest

from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import Reason
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.usage.answer import quota_list, usage_table
from loractl.scheduler.usage.text import quotas_text, usage_csv, usage_text
from loractl.scheduler.wait.queue import waiting_jobs

from ...databases import SQLITE_ALONE
from ..factories import NOON, RESULT, Clock, node_state, submission
from .screens import WIDE

pytestmark = SQLITE_ALONE

GANGS_BEFORE = "0033"
"""The revision before the one that counts an attempt's further cards."""


@pytest.fixture
def timed(store: Store) -> Store:
    return Store(store.engine, Clock())


def train(
    store: Store, user: str, hours: float, *, gib: float = 24, reason: Reason = Reason.OK, **keys: object
) -> None:
    """A job on a card of 48 GiB, from NOON on."""
    clock = store.clock
    assert isinstance(clock, Clock)
    store.jobs.submit(submission(lora=gib, method="lora", user=user, max_retries=0, **keys))
    store.cards.see(node_state("box:0", total=48 * GIB, max_jobs=8))
    claim = store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    clock.forward(hours * 3600)
    store.attempts.finish(claim, reason, "", Progress(step=5), RESULT if reason is Reason.OK else None)


def test_usage_is_added_up_by_user_label_card_and_month(timed: Store) -> None:
    train(timed, "ada", 3, labels={"team": "nlp", "run": "a"})
    train(timed, "wei", 1, labels={"team": "nlp"}, reason=Reason.BAD_DATA)
    since = NOON - dt.timedelta(days=1)
    by_user = usage_table(timed, "user", since)
    assert [(row.name, row.card_hours, row.lost_hours, row.jobs) for row in (*by_user.rows, by_user.total)] == [
        ("ada", 1.5, 0.0, 1),
        ("wei", 0.5, 0.5, 1),
        ("total", 2.0, 0.5, 2),
    ]
    by_label = usage_table(timed, "label", since)
    assert [(row.name, row.card_hours) for row in by_label.rows] == [("team=nlp", 2.0), ("run=a", 1.5)]
    assert by_label.total.card_hours == 2.0
    assert [(row.name, row.card_hours) for row in usage_table(timed, "month", since).rows] == [("2026-01", 2.0)]
    assert usage_text(by_user, WIDE).splitlines()[:3] == [
        "USER   CARD h  GiB h  LOST  WAITED h  JOBS",
        "ada       1.5     72    0%       0.0     1",
        "wei       0.5     24  100%       0.0     1",
    ]
    assert usage_csv(by_user).splitlines()[1] == "ada,1.5,72.0,0.0,0.0,1"


def test_a_job_beyond_a_quota_says_what_was_used_and_when_jobs_start_again(timed: Store) -> None:
    timed.usage.set_quota("ada", 1.0, 86400, soft=False)
    train(timed, "ada", 3)
    timed.cards.take_turn(0.0, 0.0)
    job_id = timed.jobs.submit(submission(lora=1, qlora=1))
    wait = waiting_jobs(timed, [timed.jobs.get(job_id)]).reasons[job_id]
    assert (wait.word, wait.sentence) == (
        "quota",
        "ada has used 1.5 of 1 card hours a day; jobs start again about Thu 13:00",
    )
    timed.cards.see(node_state("box:0", total=48 * GIB, max_jobs=8))
    start = waiting_jobs(timed, [timed.jobs.get(job_id)]).starts[job_id]
    assert (start.at, start.nodes, start.spread_s) == (NOON + dt.timedelta(hours=25), ("box:0",), 0)
    row = quotas_text(quota_list(timed), WIDE).splitlines()[1]
    assert row.split(maxsplit=5) == ["ada", "1", "a", "day", "1.5", "wait until about Thu 13:00"]


def test_the_expected_start_of_a_job_beyond_a_quota_is_when_a_claim_gives_it_a_card(timed: Store) -> None:
    """What runs counts on, another's job goes first, and the second job waits for the first, whose end nobody knows."""
    clock = timed.clock
    assert isinstance(clock, Clock)
    timed.usage.set_quota("ada", 1.0, 86400, soft=False)
    train(timed, "ada", 1, gib=48)
    timed.jobs.submit(submission(lora=24, method="lora", user="wei"))
    timed.cards.see(node_state("box:0", total=48 * GIB, max_jobs=1))
    busy = timed.attempts.claim("box:0")
    assert isinstance(busy, Claim)
    first, second = (timed.jobs.submit(submission(lora=24, method="lora", user="ada")) for _ in range(2))
    timed.cards.take_turn(0.0, 0.0)

    def starts() -> dict[int, dt.datetime]:
        found = waiting_jobs(timed, [timed.jobs.get(job_id) for job_id in (first, second)]).starts
        return {job_id: start.at for job_id, start in found.items()}

    assert starts() == {}, "wei's job may run for ever"
    timed.attempts.finish(busy, Reason.OK, "", Progress(step=5), RESULT)
    begins = NOON + dt.timedelta(days=1)
    assert starts() == {first: begins}
    for moment in (begins - dt.timedelta(seconds=1), begins):
        clock.now = moment
        timed.cards.see(node_state("box:0", total=48 * GIB, max_jobs=1))
        timed.cards.take_turn(0.0, 0.0)
        claim = timed.attempts.claim("box:0")
        assert (isinstance(claim, Claim) and claim.job_id == first) is (moment == begins)


def test_hours_of_further_cards_are_counted_once_in_a_lab_that_has_counted_some(timed: Store) -> None:
    """An earlier version's upgrade left them out, its workers did not."""
    for _ in range(2):
        train_on_two_cards(timed)
        train(timed, "ada", 0.25)
    before = by_card(timed)
    with timed.engine.begin() as connection:  # the first of the two ended before the upgrade
        lost = "UPDATE usage SET card_hours = card_hours - 0.75, gib_hours = gib_hours - 36"
        connection.exec_driver_sql(f"{lost} WHERE node = 'box:1' AND hour = (SELECT min(hour) FROM usage)")
    for _ in range(2):
        again(timed)
        assert by_card(timed) == before


def by_card(store: Store) -> list[tuple[str, float, float]]:
    rows = usage_table(store, "card", NOON).rows
    return [(row.name, round(row.card_hours, 6), round(row.gib_hours, 6)) for row in rows]


def train_on_two_cards(store: Store) -> None:
    """40 of 48 GiB of each for 0.9 hours."""
    clock = store.clock
    assert isinstance(clock, Clock)
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=40 * GIB, qlora=None))
    wanted = submission(lora=90, qlora=None, method="lora")
    store.jobs.submit(replace(wanted, ways=Ways(alone=False, gangs=(way,))))
    for node in ("box:0", "box:1"):
        store.cards.see(node_state(node, total=48 * GIB, max_jobs=8, gangs=True))
    claim = store.attempts.claim("box:0", gangs=True)
    assert isinstance(claim, Claim)
    clock.forward(0.9 * 3600)
    store.attempts.finish(claim, Reason.OK, "", Progress(), RESULT)


def again(store: Store) -> None:
    """Down to before further cards were counted, and up."""
    from alembic import command

    from loractl.common.store.schema import alembic_config

    with store.engine.connect() as connection, alembic_config(connection) as config:
        command.downgrade(config, GANGS_BEFORE)
        command.upgrade(config, "head")
        connection.commit()
