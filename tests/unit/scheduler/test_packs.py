"""What people are told of jobs that train in one process: who is beside whom, and why a job is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loractl.common.job.status import Reason
from loractl.common.placement.hosts import base_key
from loractl.common.store.records import Choice, Claim, NewHost, Page, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.fleet.answer import fleet
from loractl.scheduler.fleet.text import devices
from loractl.scheduler.status.job import job_in_full
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.status.overview import overview
from loractl.scheduler.status.overview_text import overview_text
from loractl.scheduler.why.answer import Why, why
from loractl.scheduler.why.text import why_text

from ...databases import SQLITE_ALONE
from ..factories import node_state, submission

pytestmark = SQLITE_ALONE

NODE = "box:0"
PIPE = Screen(width=120, unicode=True, color=False)


def queue(store: Store, length: int = 8, **keys: Any) -> int:
    rows = {"dataset": {"path": "org/data", "max_length": length}, "training": {"per_device_train_batch_size": 1}}
    return store.jobs.submit(submission(lora=8, method="lora", **{**rows, **keys}))


def claim(store: Store) -> Claim:
    mine = store.attempts.claim(NODE, joins=True)
    assert isinstance(mine, Claim)
    return mine


@pytest.fixture
def packed(store: Store) -> Store:
    """A small card whose one trainer has a base of 5 GiB and takes more jobs."""
    store.cards.see(node_state(NODE, total=24 * GIB, max_jobs=1))
    queue(store)
    mine = claim(store)
    key = base_key(mine.spec, mine.method)
    assert key is not None and store.hosts.open(mine, NewHost(host="h", node=NODE, key=key, bytes=5 * GIB))
    return store


def asked(store: Store, job_id: int) -> Why:
    found = why(store, job_id, with_remedies=False)
    assert isinstance(found, Why)
    return found


def test_a_job_that_is_about_to_join_says_beside_whom(packed: Store) -> None:
    found = asked(packed, queue(packed))
    assert found.wait.sentence == f"{NODE} is about to take it with job 1 on one base"
    assert [(fit.when, fit.then) for fit in found.cards] == [("now", "about to train with job 1 on one base")]


def test_a_job_that_does_not_join_says_by_which_numbers(packed: Store) -> None:
    found = asked(packed, queue(packed, length=1024))
    why_not = "it does not train with job 1 on one base: 2 jobs in one pass are"
    assert found.wait.word == "busy" and f"{NODE} when job 1 ends; {why_not}" in found.wait.sentence
    assert why_not in found.cards[0].then and "less than 1.33" in found.cards[0].then


def test_every_card_with_its_base_says_why_it_does_not_join_there(packed: Store) -> None:
    """One of them alone said so, and that an end is not known stood behind the numbers."""
    packed.cards.see(node_state("owl:0", total=24 * GIB, max_jobs=1))
    queue(packed)
    second = packed.attempts.claim("owl:0", joins=False)
    assert isinstance(second, Claim)
    key = base_key(second.spec, second.method)
    assert key is not None and packed.hosts.open(second, NewHost(host="o", node="owl:0", key=key, bytes=5 * GIB))
    found = asked(packed, queue(packed, length=1024))
    for number, fit in enumerate(found.cards, start=1):
        assert fit.then.startswith(
            f"has a slot when job {number} ends (time not known); it does not train with job {number}"
        )
        assert "less than 1.33" in fit.then


@pytest.mark.parametrize(
    ("keys", "why_not"),
    [
        ({"resources": {"exclusive": True}}, "it trains alone (resources.exclusive)"),
        (
            {"training": {"exact": True}},
            "their base has another revision, training.dtype, attn_implementation or exact",
        ),
    ],
)
def test_a_job_that_can_t_join_says_which_setting_keeps_it_apart(
    packed: Store, keys: dict[str, Any], why_not: str
) -> None:
    found = asked(packed, queue(packed, **keys))
    assert found.wait.sentence == f"{NODE} when job 1 ends; it does not train with job 1 on one base: {why_not}"


def test_a_job_whose_shared_trainer_was_lost_says_that_it_is_tried_alone(packed: Store) -> None:
    second = queue(packed)
    packed.attempts.finish(claim(packed), Reason.HOST_LOST, "its trainer ended", Progress())
    assert "it is tried alone, since the trainer that it shared was lost" in asked(packed, second).wait.sentence


def test_why_of_a_running_job_says_what_is_wrong_with_its_card(packed: Store) -> None:
    """Its worker was dead, and all that was said is that it runs there."""
    told = f"Job 1 does not wait: it is running on {NODE}"
    assert why_text(why(packed, 1), PIPE).startswith(f"{told}. ")
    packed.cards.drain(NODE, "mara", "new fans", until=None, at_once=False)
    assert why_text(why(packed, 1), PIPE).startswith(f"{told}, its card is drained by mara. ")


def test_who_asks_about_a_held_job_reads_how_it_is_released(packed: Store) -> None:
    held = queue(packed)
    packed.jobs.hold(held, "mara", "later")
    assert why_text(why(packed, held), PIPE).endswith(f"Release it: loractl retry {held}")
    assert f"Release it: loractl retry {held}" in job_text(job_in_full(packed, held), PIPE)


def test_jobs_on_one_base_are_told_together(packed: Store) -> None:
    second = queue(packed, user="bob")
    claim(packed)
    assert f"attempt 1, preparing, with job {second} on one base" in job_text(job_in_full(packed, 1), PIPE)
    third = queue(packed)
    claim(packed)
    assert f", with jobs 1 and {second} on one base" in job_text(job_in_full(packed, third), PIPE)
    running = overview_text(overview(packed, Choice(), Page()), Screen(width=80, unicode=True, color=False))
    assert f" {NODE} with {second}, {third} " in running and f" {NODE} with 1, {second} " in running
    seen = fleet(packed)
    assert f"ada 1 + bob {second} + ada {third} on one base" in devices(seen, PIPE)
    (host,) = seen.as_json()[0]["hosts"]
    assert (host["open"], host["jobs"], host["job_id"]) == (True, [1, second, third], 1)


def test_a_cancelled_job_s_memory_is_told_until_it_is_out_of_its_trainer(packed: Store) -> None:
    second = queue(packed, user="bob")
    mine = claim(packed)
    packed.jobs.cancel(second, "bob")
    packed.attempts.finish(mine, Reason.CANCELLED, "cancelled while it ran", Progress(), inside=True)
    assert f"ada 1, {second} is leaving, 3.0 held" in devices(fleet(packed), PIPE)
    told = job_text(job_in_full(packed, second), PIPE)
    assert "cancelled: cancelled while it ran; it holds 3.0 GiB until it is out of its trainer" in told
    (host,) = fleet(packed).as_json()[0]["hosts"]
    assert (host["jobs"], host["leavers"]) == ([1], [{"job_id": second, "bytes": 3 * GIB}])
    large = packed.jobs.submit(submission(lora=20, method="lora", base_model="org/b"))
    held = f"job {second} has ended but holds 3.0 GiB until it has left the trainer"
    found = asked(packed, large)
    assert (found.wait.sentence, found.cards[0].then) == (f"on {NODE} {held}", held)
    packed.jobs.retry(second, "bob")
    assert asked(packed, second).wait.sentence == f"on {NODE} {held}"
    packed.hosts.leave(mine)
    assert "leaving" not in devices(fleet(packed), PIPE) and "with job 1" in asked(packed, second).wait.sentence


def test_a_trainer_that_takes_no_more_jobs_says_why(packed: Store) -> None:
    packed.hosts.spoil("h", NODE, "job 9 ended there with disk_full")
    found = asked(packed, queue(packed))
    why_not = (
        "it does not train with job 1 on one base: their trainer takes no more jobs: job 9 ended there with disk_full"
    )
    assert found.wait.sentence == f"{NODE} when job 1 ends; {why_not}"
    assert "takes no more jobs: job 9 ended there with disk_full" in devices(fleet(packed), replace(PIPE, width=200))
    (host,) = fleet(packed).as_json()[0]["hosts"]
    assert host["spoilt"] == "job 9 ended there with disk_full"


def test_a_list_leaves_to_why_what_keeps_jobs_apart(packed: Store) -> None:
    """It stood behind each waiting job, in four lines whose numbers differed."""
    first, second = queue(packed, length=1024), queue(packed, length=900)
    listed = overview_text(overview(packed, Choice(), Page()), Screen(width=80, unicode=True, color=False))
    assert "one base" not in listed and "one by one" not in listed
    assert f"{NODE} when job 1 ends" in listed and f"job {first} goes first" in " ".join(listed.split())
    assert "does not train with job 1 on one base" in why_text(why(packed, second), PIPE)
