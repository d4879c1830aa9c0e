"""The outbox: what is told to whom, once an event and channel, leased to one sender at a time."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine, select

from loractl.common.channels import Channel
from loractl.common.errors import ValueRefused
from loractl.common.job.status import LAB_FAILURE_LIMIT, LAB_RETRY_DELAY_S, Reason
from loractl.common.job.sweep import NewSweep
from loractl.common.store.queries.outbox.deliveries import KEPT_S, LATE_S, MOST_PAUSE_S, PATIENCE_S, TRIES
from loractl.common.store.records import Claim, Delivery, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Job, OutboxMessage
from loractl.common.units import GIB

from ....databases import SQLITE_ALONE
from ...factories import RESULT, Clock, node_state, submission, take
from .test_fleet_rounds import turn

LEASE_S = 90.0
NOBODY_S = "gave up: no worker's config.toml names this channel"
OPS = Channel(name="ops", kind="slack")
ADA = Channel(name="ada-mail", kind="mail", users=frozenset({"ada"}))
LAB = Channel(name="lab-chat", kind="slack", lab=True)
SENT = Delivery(sent=True)
AWAY = Delivery(again=True, why="HTTP 500")


def due(store: Store, *channels: Channel) -> OutboxMessage | None:
    return store.outbox.lease(channels, LEASE_S)


def all_due(store: Store, *channels: Channel) -> list[tuple[str, str]]:
    """Channel and subject of all that is due, each marked as sent."""
    got = []
    while (message := due(store, *channels)) is not None:
        assert store.outbox.settle(message, SENT)
        got.append((message.channel, message.subject))
    return sorted(got)


def end(store: Store, reason: Reason, message: str = "because") -> Claim:
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, reason, message, Progress(), RESULT if reason is Reason.OK else None)
    return claim


def notes(store: Store, job_id: int) -> list[str]:
    return [event.text for event in store.jobs.events(job_id) if event.kind == "notify"]


@pytest.mark.both
def test_a_result_is_told_to_each_channel_once_and_says_it_in_the_subject(store: Store) -> None:
    store.jobs.submit(submission(name="triage-r32", notify=["ops", "me", "ada-mail"]))
    end(store, Reason.OK, "better, loss 4.49 -> 0.25")
    said = "triage-r32: better, loss 4.49 -> 0.25"
    assert all_due(store, LAB) == [], "a process sends to the channels of its own configuration alone"
    assert all_due(store, OPS, ADA) == [("ada-mail", said), ("ops", said)], "me and ada-mail are one here"
    assert all_due(store, OPS, ADA) == []


@pytest.mark.both
def test_who_names_no_channel_is_told_nothing_and_a_cancelled_job_neither(store: Store) -> None:
    store.jobs.submit(submission(notify=[]))
    store.jobs.submit(submission())
    store.jobs.cancel(store.jobs.submit(submission(notify=["ops"])), "ada")
    for _ in range(2):
        end(store, Reason.OK)
    assert all_due(store, OPS, ADA, LAB) == []


@SQLITE_ALONE
def test_a_retried_attempt_is_silent_and_the_failure_for_good_is_told(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(submission(name="tiny", notify=["ops"], max_retries=1))
    end(timed, Reason.TRAINER_ERROR, "exit status 1")
    assert all_due(timed, OPS) == []
    clock.forward(3600)
    end(timed, Reason.TRAINER_ERROR, "exit status 1")
    assert all_due(timed, OPS) == [("ops", "tiny: failed (trainer_error), exit status 1")]


@SQLITE_ALONE
def test_a_job_that_is_held_and_a_card_that_is_closed_are_told(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(submission(name="tiny", notify=["ops"], preemptible=True))
    for number in range(LAB_FAILURE_LIMIT):
        end_on = f"box{number}:0"
        claim = take(timed, node=end_on)
        assert isinstance(claim, Claim)
        timed.attempts.finish(claim, Reason.GPU_ERROR, "Xid 79", Progress())
        clock.forward(LAB_RETRY_DELAY_S)
    ((channel, subject),) = all_due(timed, OPS)
    assert channel == "ops" and subject.startswith("tiny: held, its card failed")


@pytest.mark.both
def test_a_closed_card_is_told_to_the_lab(timed: Store, clock: Clock) -> None:
    timed.cards.see(node_state("b:0", total=96 * GIB))
    for user in ("ada", "bob"):
        timed.jobs.submit(submission(user=user))
        timed.cards.see(node_state("a:0", total=96 * GIB))
        claim = timed.attempts.claim("a:0", distrusted=frozenset({"b:0"}))
        assert isinstance(claim, Claim)
        timed.attempts.finish(claim, Reason.GPU_ERROR, "Xid 79", Progress())
    assert "a:0" in timed.cards.drains()
    ((channel, subject),) = all_due(timed, LAB)
    assert channel == "lab-chat" and subject.startswith("a:0: closed, ")


def test_a_box_that_falls_silent_is_told_once_and_again_when_it_came_back_and_fell_silent(
    timed: Store, clock: Clock
) -> None:
    def go_on(seconds: int) -> None:
        for _ in range(seconds // 5):
            clock.forward(5)
            timed.cards.see(node_state("living:0"))
            turn(timed)

    for node in ("gone:0", "gone:1"):
        timed.cards.see(node_state(node))
    go_on(150)
    assert all_due(timed, LAB) == [("lab-chat", "gone: silent since 2026-01-14 12:00 UTC")]
    timed.cards.see(node_state("gone:0"))
    go_on(100)
    again = [subject for _, subject in all_due(timed, LAB)]
    assert again == ["gone: silent since 2026-01-14 12:02 UTC", "gone:1: silent since 2026-01-14 12:00 UTC"]


@SQLITE_ALONE
def test_a_box_that_stops_in_order_is_told_to_nobody(timed: Store, clock: Clock) -> None:
    timed.cards.see(node_state("gone:0"))
    timed.cards.forget("gone:0")
    for _ in range(40):
        clock.forward(5)
        turn(timed)
    assert all_due(timed, LAB) == []


@pytest.mark.both
def test_a_sweep_is_one_message_when_its_last_member_has_ended(store: Store) -> None:
    sweep = NewSweep(name="grid", varied={})
    store.sweeps.submit(sweep, [submission(notify=["ops"], max_retries=0) for _ in range(3)])
    end(store, Reason.OK)
    end(store, Reason.TRAINER_ERROR)
    assert all_due(store, OPS) == []
    end(store, Reason.OK)
    assert all_due(store, OPS) == [("ops", "grid: sweep 1 is over, 2 of 3 succeeded")]


@SQLITE_ALONE
def test_a_sweep_that_a_cancel_ends_is_told_of_by_the_next_round_once(timed: Store, clock: Clock) -> None:
    timed.sweeps.submit(NewSweep(name="grid", varied={}), [submission(notify=["ops"]) for _ in range(3)])
    end(timed, Reason.OK)
    turn(timed)
    for job_id in (2, 3):
        assert all_due(timed, OPS) == []
        timed.jobs.cancel(job_id, "ada")
        clock.forward(20)
        turn(timed)
    assert all_due(timed, OPS) == [("ops", "grid: sweep 1 is over, 1 of 3 succeeded, 2 cancelled")]
    for _ in range(5):
        clock.forward(20)
        turn(timed)
    timed.sweeps.submit(NewSweep(name="all", varied={}), [submission(notify=["ops"]) for _ in range(2)])
    timed.sweeps.cancel(2, "ada")
    clock.forward(3600)  # no worker looked meanwhile
    turn(timed)
    assert all_due(timed, OPS) == [("ops", "all: sweep 2 is over, 0 of 2 succeeded, 2 cancelled")]


@pytest.mark.both
def test_the_last_two_members_that_end_at_once_tell_of_the_sweep_once(postgres_engine: Engine) -> None:
    store = Store(postgres_engine)
    for _ in range(5):
        members = [submission(user=user, notify=["ops"]) for user in ("ada", "bob")]
        store.sweeps.submit(NewSweep(name="grid", varied={}), members)
        # a card each: beside one that ends in a moment the other might wait for that
        claims = [claim for node in ("a:0", "b:0") if isinstance(claim := take(store, node=node), Claim)]
        start = threading.Barrier(len(claims))

        def finish(claim: Claim, start: threading.Barrier = start) -> None:
            start.wait()
            store.attempts.finish(claim, Reason.OK, "fine", Progress(), RESULT)

        threads = [threading.Thread(target=finish, args=(claim,)) for claim in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(threads) == 2 and len(all_due(store, OPS)) == 1


def test_a_message_has_one_sender_and_another_one_with_the_same_id_when_that_is_lost(
    timed: Store, clock: Clock
) -> None:
    timed.jobs.submit(submission(notify=["ops"]))
    end(timed, Reason.OK)
    first = due(timed, OPS)
    assert first is not None
    clock.forward(LEASE_S - 1)
    assert due(timed, OPS) is None
    clock.forward(2)
    second = due(timed, OPS)
    assert second is not None
    assert (second.message_id, second.tries) == (first.message_id, 2)
    assert timed.outbox.settle(first, SENT) is False, "its lease is over"
    assert timed.outbox.settle(second, SENT)
    assert due(timed, OPS) is None


@pytest.mark.both
def test_pauses_grow_the_receiver_s_own_counts_and_after_eight_tries_the_history_says_so(
    timed: Store, clock: Clock
) -> None:
    job_id = timed.jobs.submit(submission(notify=["ops"]))
    end(timed, Reason.OK)
    pauses = []
    for number in range(TRIES):
        message = due(timed, OPS)
        assert message is not None
        timed.outbox.settle(message, Delivery(again=True, why="HTTP 429", after_s=30.0) if number == 0 else AWAY)
        if number < TRIES - 1:
            pauses.append(_pause(timed))
            clock.forward(pauses[-1] - 1)
            assert due(timed, OPS) is None
            clock.forward(1.001)
    assert 30 <= pauses[0] <= 35
    assert pauses[:3] == sorted(pauses[:3]) and max(pauses) <= 1.2 * MOST_PAUSE_S + 5
    clock.forward(PATIENCE_S)
    assert due(timed, OPS) is None
    (note,) = notes(timed, job_id)
    assert note.endswith("to channel ops: gave up after 8 tries: HTTP 500")


@pytest.mark.both
def test_messages_are_counted_by_channel_without_a_word_of_what_they_say(timed: Store, clock: Clock) -> None:
    for names in (["ops"], ["ops", "ada-mail"], ["nobodys"]):
        timed.jobs.submit(submission(name="secret", notify=names))
        end(timed, Reason.OK, "sk-123456")
    first, *_ = [due(timed, OPS)]
    assert first is not None and timed.outbox.settle(first, SENT)
    gone = due(timed, ADA)
    assert gone is not None and timed.outbox.settle(gone, Delivery(why="HTTP 410"))
    clock.forward(60)
    told = {pile.channel: (pile.waiting, pile.sent, pile.given_up) for pile in timed.outbox.traffic()}
    assert told == {"ops": (1, 1, 0), "ada-mail": (0, 0, 1), "nobodys": (1, 0, 0)}
    assert {pile.oldest for pile in timed.outbox.traffic()} == {None, first.at}
    clock.forward(PATIENCE_S + 3600)
    turn(timed)
    assert {pile.channel: (pile.waiting, pile.sent, pile.given_up) for pile in timed.outbox.traffic()} == {
        "ops": (0, 0, 1), "ada-mail": (0, 0, 0), "nobodys": (0, 0, 1)
    }  # fmt: skip


def _pause(store: Store) -> float:
    """Seconds until the only message is due."""
    with store.begin(read_only=True) as tx:
        (row,) = tx.session.scalars(select(OutboxMessage))
        return float((row.due_at - tx.now()).total_seconds())


@SQLITE_ALONE
def test_what_another_try_can_t_help_is_given_up_at_once(timed: Store) -> None:
    job_id = timed.jobs.submit(submission(notify=["ops"]))
    end(timed, Reason.OK)
    message = due(timed, OPS)
    assert message is not None
    timed.outbox.settle(message, Delivery(why="HTTP 410"))
    assert due(timed, OPS) is None
    assert notes(timed, job_id) == [f"message {message.message_id} to channel ops: gave up after 1 tries: HTTP 410"]


@SQLITE_ALONE
def test_a_mail_that_some_of_its_recipients_refuse_is_sent_and_the_history_says_so(timed: Store) -> None:
    job_id = timed.jobs.submit(submission(notify=["ops"]))
    end(timed, Reason.OK)
    message = due(timed, OPS)
    assert message is not None
    timed.outbox.settle(message, Delivery(sent=True, why="SMTP 550 for 1 of its 2 recipients"))
    assert due(timed, OPS) is None
    assert notes(timed, job_id) == [
        f"message {message.message_id} to channel ops: sent, but SMTP 550 for 1 of its 2 recipients"
    ]


@pytest.mark.both
def test_a_message_to_a_channel_that_nobody_has_is_given_up_after_a_day_and_forgotten_after_a_week(
    timed: Store, clock: Clock
) -> None:
    job_id = timed.jobs.submit(submission(notify=["nobodys", "me"]))
    end(timed, Reason.OK)
    assert timed.outbox.stuck() == [], "a worker may take them in a moment"
    clock.forward(LATE_S)
    assert [(pile.channel, pile.count, pile.outcome) for pile in timed.outbox.stuck()] == [
        ("me", 1, None),
        ("nobodys", 1, None),
    ]
    clock.forward(PATIENCE_S + 1)
    turn(timed)
    assert {pile.outcome for pile in timed.outbox.stuck()} == {NOBODY_S}
    assert len(notes(timed, job_id)) == 2
    assert "no worker's config.toml names this channel" in notes(timed, job_id)[0]
    clock.forward(KEPT_S)
    turn(timed)
    with timed.begin(read_only=True) as tx:
        assert tx.session.scalars(select(OutboxMessage)).all() == []


@pytest.mark.parametrize("notify", [["ops", 7, "a\r\nb"], "ops", {"a": 1}], ids=str)
def test_a_spec_that_names_channels_in_a_wrong_form_is_refused_at_the_door(store: Store, notify: object) -> None:
    job_id = store.jobs.submit(submission(notify=["ops"]))
    with pytest.raises(ValueRefused, match="refuses the value of spec"), store.begin(read_only=False) as tx:
        job = tx.session.get(Job, job_id)
        assert job is not None
        job.spec = {**job.spec, "notify": notify}


@pytest.mark.both
def test_a_job_s_owner_is_told_who_else_has_changed_it(store: Store) -> None:
    job_id = store.jobs.submit(submission(name="mine", notify=["ops"]))
    store.jobs.hold(job_id, "ada")
    store.jobs.release(job_id, "bob")
    store.jobs.hold(job_id, "adam", "its data are wrong")
    store.jobs.cancel(job_id, "mara")
    turn(store)
    first = due(store, OPS)
    assert first is not None and first.text.startswith(f"Job {job_id} of ada. It was cancelled. ")
    store.outbox.settle(first, SENT)
    said = {"held by adam: its data are wrong", "queued again by bob", "cancelled by mara"}
    assert {first.subject, *(subject for _, subject in all_due(store, OPS))} == {f"mine: {one}" for one in said}
    turn(store)
    assert all_due(store, OPS) == []
