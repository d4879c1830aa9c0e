"""Hosts that take several jobs: how they open, what their passes teach, and how members end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loractl.common.job.status import Reason, Status
from loractl.common.placement.hosts import base_key
from loractl.common.placement.pack_rule import MeasuredPass, PassLaw
from loractl.common.store.queries.cards.packs import BYTES_A_TOKEN
from loractl.common.store.records import Claim, NewHost, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB

from ....databases import SQLITE_ALONE
from ...factories import node_state, submission

pytestmark = SQLITE_ALONE

NODE = "box:0"


def begin(store: Store, total: int = 24, gib: float = 8) -> Claim:
    """A job that runs on a card of `total` GiB."""
    store.cards.see(node_state(NODE, total=total * GIB, max_jobs=4))
    store.jobs.submit(submission(lora=gib, method="lora"))
    taken = store.attempts.claim(NODE)
    assert isinstance(taken, Claim)
    return taken


def opens(store: Store, mine: Claim, gib: int = 5, mark: str = "h1") -> bool:
    key = base_key(mine.spec, mine.method)
    assert key is not None
    return store.hosts.open(mine, NewHost(host=mark, node=NODE, key=key, bytes=gib * GIB))


def test_a_host_opens_while_its_job_runs_and_that_holds_its_base(store: Store) -> None:
    mine = begin(store)
    assert opens(store, mine)
    (row,) = store.hosts.of_card(NODE)
    assert (row.open, row.job_id, row.bytes) == (True, mine.job_id, 5 * GIB)
    assert store.attempts.of_job(mine.job_id)[0].host == "h1"
    assert store.cards.fleet().cards[NODE].taken == 8 * GIB
    assert not opens(store, mine, 30, "large"), "no room"
    store.attempts.give_back(NODE)
    assert not opens(store, mine), "the lease is lost"


def test_a_host_s_passes_teach_its_law(store: Store) -> None:
    mine = begin(store)
    opens(store, mine)
    passes = [MeasuredPass(tokens=64 * count, members=count, seconds=0.1 * count) for count in (1, 2, 4)]
    store.hosts.note_passes("h1", passes[:1])
    store.hosts.note_passes("h1", passes[1:])
    store.hosts.note_passes("gone", passes)
    law = PassLaw.start(quantised=False)
    for measured in passes:
        law = law.learn(measured)
    (row,) = store.hosts.of_card(NODE)
    assert PassLaw.from_json(row.law, quantised=False) == law


def test_a_lost_host_spends_no_retry_and_holds_nobody(store: Store) -> None:
    mine = begin(store)
    opens(store, mine)
    for _ in range(4):
        assert store.attempts.finish(mine, Reason.HOST_LOST, "its trainer ended", Progress()) is Status.QUEUED
        again = store.attempts.claim(NODE)
        assert isinstance(again, Claim)
        mine = again
    job = store.jobs.get(mine.job_id)
    assert (job.retries_used, job.lab_failures, job.avoids, job.held) == (0, 0, None, False)


def test_a_member_that_ended_is_inside_until_it_has_left(store: Store) -> None:
    mine = begin(store)
    opens(store, mine)
    store.jobs.cancel(mine.job_id, "ada")
    assert (
        store.attempts.finish(mine, Reason.CANCELLED, "cancelled by ada", Progress(), inside=True) is Status.CANCELLED
    )
    assert store.attempts.of_job(mine.job_id)[0].inside
    store.hosts.leave(mine)
    assert not store.attempts.of_job(mine.job_id)[0].inside


def test_a_stranger_s_micro_batch_is_no_longer_than_the_bytes_of_its_rows(store: Store) -> None:
    mine = begin(store)
    opens(store, mine)
    stored = {"uri": "file:///a", "sha256": "a" * 64, "rows": 10, "bytes": 2000}
    long: dict[str, Any] = {"method": "lora", "dataset": {"path": "org/data", "max_length": 1024}, "user": "bob"}
    one_row = {"per_device_train_batch_size": 1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    known = store.jobs.submit(replace(submission(**long, training=one_row), data={"path": stored}))
    other = store.jobs.submit(submission(**long, training=one_row))
    packing = store.jobs.submit(
        replace(submission(**long, training={**one_row, "packing": True}), data={"path": stored})
    )
    estimated = store.jobs.submit(
        replace(submission(**long, training=one_row), data={"path": {**stored, "tokens": 900}})
    )
    part = {**long, "dataset": {**long["dataset"], "split": "train[:5]"}}
    sliced = store.jobs.submit(replace(submission(**part, training=one_row), data={"path": stored}))
    asked = store.cards.newcomers(store.jobs.ready(10))
    tokens = {job_id: newcomer.packed.tokens for job_id, newcomer in asked.items()}
    assert tokens == {
        known: 200 / BYTES_A_TOKEN,
        other: 1024,
        packing: 1024,
        estimated: 90,
        sliced: 200 / BYTES_A_TOKEN,
    }
    passes = {job_id: asked[job_id].packed.passes for job_id in (known, other, sliced)}
    assert passes == {known: 2 * 5 * 3, other: None, sliced: None}, "how many rows a slice has is not known here"
