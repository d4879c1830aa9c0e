"""A change of a submitted job: what it waits for is computed again; it is written only if nothing moved meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import UsageError, WrongState
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import Reason, Status
from loractl.common.placement.lines import QueueKey
from loractl.common.store.records import Claim, Progress, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB
from loractl.scheduler.change.amendment import amendment, require_unended, unchecked_rows
from loractl.scheduler.submit.ancestor import settle_predecessors

from ...factories import RESULT, node_state, spec, submission, take


def edited(store: Store, job_id: int, *overrides: str) -> Job:
    return store.jobs.edit(amendment(store, job_id, overrides), "bob")


def started(store: Store) -> Claim:
    taken = take(store)
    assert isinstance(taken, Claim)
    return taken


def test_a_waiting_job_changes_its_line_and_its_history_says_who_did_it(store: Store) -> None:
    job_id, other = store.jobs.submit(submission()), store.jobs.submit(submission())
    job = edited(store, other, "priority=7", 'resources.node_labels.nvlink="yes"', "labels.team=a")
    key = QueueKey.parse(job.queue_key)
    assert (job.priority, job.queue_key[:5], key.requires) == (7, "09993", {("nvlink", "yes")})
    assert (job.labels, job.spec["labels"]) == ({"team": "a"}, {"team": "a"})
    assert store.jobs.events(other)[-1].text == (
        'edited by bob: resources.node_labels {} -> {"nvlink": "yes"}, priority 0 -> 7, labels {} -> {"team": "a"}'
    )
    edited(store, other, "resources.node_labels={}")
    assert started(store).job_id == other, "its priority counts"
    assert started(store).job_id == job_id


def test_its_method_and_its_limit_say_anew_what_it_waits_for(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=20, qlora=6))
    assert edited(store, job_id, "method=lora").vram_needed == 20 * GIB
    job = edited(store, job_id, "method=auto", "resources.max_vram=8GiB")
    assert (job.methods, job.vram_needed) == (["qlora"], 6 * GIB)
    with pytest.raises(UsageError, match=r"needs 6.0 GiB by its plan, its resources.max_vram is 1.0"):
        edited(store, job_id, "resources.max_vram=1GiB")
    patient = edited(store, job_id, "resources.max_vram=null", "lora_patience=1h")
    assert (patient.methods, patient.vram_needed) == (["lora", "qlora"], 20 * GIB)
    assert patient.lora_until is not None


def of_two_cards(store: Store, least_gib: float = 7) -> int:
    """A job that asks for two cards and needs so much of each, which an attempt has taught."""
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=int(least_gib * GIB), qlora=None))
    asked = submission(lora=20, qlora=None, method="lora", resources={"cards": 2, "parallel": "sharded"})
    return store.jobs.submit(replace(asked, ways=Ways(alone=False, gangs=(way,))))


@pytest.mark.parametrize("change", ["priority=7", "labels.team=a", "resources.time_limit=2h", "training.max_steps=9"])
def test_a_job_of_several_cards_keeps_them_whatever_else_is_changed(store: Store, change: str) -> None:
    """A raised priority once let a job that asked for two cards run on one, with half of what it needs."""
    job_id = of_two_cards(store)
    asked = store.jobs.get(job_id).gangs
    assert asked is not None and edited(store, job_id, change).gangs == asked


def test_a_running_job_of_several_cards_asks_for_them_again_after_an_edit(store: Store) -> None:
    job_id = of_two_cards(store)
    for node in ("box:0", "box:1"):
        store.cards.see(node_state(node, gangs=True))
    claim = store.attempts.claim("box:0", gangs=True)
    assert isinstance(claim, Claim) and len(claim.shares) == 2
    edited(store, job_id, "priority=3")
    store.attempts.finish(claim, Reason.DRAINED, "stopped", Progress(), None)
    again = store.attempts.claim("box:0", gangs=True)
    assert isinstance(again, Claim) and len(again.shares) == 2


def test_another_number_of_cards_is_planned_anew(store: Store) -> None:
    job_id = of_two_cards(store)
    assert edited(store, job_id, "resources.cards=1", "resources.parallel=auto").gangs is None
    several = edited(store, job_id, "resources.cards=2").gangs
    assert several is not None and [way["cards"] for way in several["ways"]] == [2, 2], "data and sharded"


def test_what_attempts_have_taught_stays_unless_the_memory_is_decided_anew(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=20, qlora=6))
    assert edited(store, job_id, "training.learning_rate=1e-3").vram_lora == 20 * GIB
    job = edited(store, job_id, "dataset.max_length=64")
    assert (job.vram_lora, job.vram_needed) == (None, None), "no config of this base is here: the box plans it"
    assert job.need_key is not None


@pytest.mark.both
def test_pieces_of_another_batch_go_with_it(store: Store) -> None:
    """A job that begins in smaller pieces trained with their batch, whatever its spec said after an edit."""
    smaller = Adjustment(micro_batch=1, accumulation=16)
    job_id = store.jobs.submit(replace(submission(), adjustment=smaller))
    assert edited(store, job_id, "training.learning_rate=1e-3").adjustment == smaller.as_json()
    assert edited(store, job_id, "training.gradient_accumulation_steps=3").adjustment is None


def test_stored_rows_are_looked_at_again_where_a_change_cuts_others(store: Store, tmp_path: Path) -> None:
    rows, artifacts = tmp_path / "rows.jsonl", ArtifactStore(tmp_path.as_uri())
    rows.write_text("".join(json.dumps({"prompt": "word " * 100, "completion": str(n)}) + "\n" for n in range(2)))
    uri, sha256 = artifacts.put_dataset(rows)
    stored = {"path": {"uri": uri, "sha256": sha256}}
    job_id = store.jobs.submit(replace(submission(dataset={"path": str(rows)}), data=stored))
    rows.unlink()

    def looked(*overrides: str) -> list[str]:
        return unchecked_rows(amendment(store, job_id, overrides), lambda: artifacts, lambda: None)

    (said,) = looked("dataset.max_length=64")
    assert said.startswith("Not checked: whether rows are too long, there is no tokenizer"), "500 letters, 64 tokens"
    assert looked("dataset.max_length=64", "dataset.on_overflow=drop") == []
    assert looked("dataset.max_length=2048") == []
    assert looked("priority=3") == []


def test_a_running_job_takes_another_time_limit_with_its_next_beat(store: Store) -> None:
    store.jobs.submit(submission(resources={"time_limit": "1h"}))
    claim = started(store)
    assert store.attempts.beat(claim, Progress()).time_limit == 3600
    edited(store, claim.job_id, "resources.time_limit=90s", "priority=3")
    assert store.attempts.beat(claim, Progress()).time_limit == 90
    edited(store, claim.job_id, "resources.time_limit=null")
    assert store.attempts.beat(claim, Progress()).time_limit is None
    with pytest.raises(UsageError, match="max_retries can't change while job 1 runs"):
        edited(store, claim.job_id, "max_retries=5")


def test_a_job_that_began_meanwhile_is_not_changed_behind_its_back(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    late = amendment(store, job_id, ["lora.r=8"])
    started(store)
    with pytest.raises(WrongState, match="job 1 has changed meanwhile"):
        store.jobs.edit(late, "bob")
    assert store.jobs.get(job_id).spec["lora"]["r"] == 16


@pytest.mark.both
def test_a_retry_with_a_change_goes_on_from_the_checkpoint(store: Store) -> None:
    store.jobs.submit(submission(resources={"time_limit": "1h"}))
    claim = started(store)
    store.attempts.keep_checkpoint(claim, StoredCheckpoint(step=40, prefix="p", manifest_sha256="c" * 64))
    store.attempts.finish(claim, Reason.TIMED_OUT, "ran longer", Progress(), None)
    with pytest.raises(WrongState, match="job 1 has failed: it does not wait"):
        require_unended(store, claim.job_id)
    with pytest.raises(UsageError, match=r"training.learning_rate can't change once job 1 has begun"):
        amendment(store, claim.job_id, ["training.learning_rate=1e-3"])
    assert store.jobs.get(claim.job_id).status is Status.FAILED
    store.jobs.retry(claim.job_id, "bob", amendment(store, claim.job_id, ["resources.time_limit=2h"]))
    assert [event.text for event in store.jobs.events(claim.job_id)][-2:] == [
        "edited by bob: resources.time_limit 60 min -> 2 h 00 min", "queued again by bob",
    ]  # fmt: skip
    again = started(store)
    assert again.checkpoint is not None and again.checkpoint.step == 40
    assert again.spec.resources.time_limit == 7200
    store.attempts.finish(again, Reason.OK, "done", Progress(), RESULT)
    with pytest.raises(WrongState, match="job 1 has succeeded and can't be changed"):
        amendment(store, claim.job_id, ["priority=1"])


@pytest.mark.both
def test_a_job_that_failed_before_its_first_step_takes_the_setting_that_its_failure_names(store: Store) -> None:
    store.jobs.submit(submission())
    claim = started(store)
    with pytest.raises(UsageError) as no:
        amendment(store, claim.job_id, ["dataset.on_overflow=drop"])
    assert no.value.hint == "queue it as a new job: loractl submit --like 1 --set dataset.on_overflow=..."
    store.attempts.finish(claim, Reason.BAD_DATA, "row 1: has no token to learn", Progress(), None)
    store.jobs.retry(claim.job_id, "bob", amendment(store, claim.job_id, ["dataset.on_overflow=drop", "lora.r=8"]))
    again = started(store)
    assert (again.spec.dataset.on_overflow.value, again.spec.lora.r) == ("drop", 8)
    step = Progress(step=1, total_steps=9, metrics=((1, "loss", 2.0),))
    store.attempts.beat(again, step)
    store.attempts.finish(again, Reason.BAD_DATA, "a row can't be read", step, None)
    store.jobs.retry(claim.job_id, "bob")
    with pytest.raises(UsageError, match=r"lora.r can't change once job 1 has begun") as no:
        amendment(store, claim.job_id, ["lora.r=4"])
    assert no.value.hint == "queue it as a new job: loractl submit --like 1 --set lora.r=..."


def test_a_retry_that_is_refused_changes_nothing(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    with pytest.raises(WrongState, match="only a failed or cancelled job"):
        store.jobs.retry(job_id, "bob", amendment(store, job_id, ["priority=9"]))
    assert (store.jobs.get(job_id).priority, len(store.jobs.events(job_id))) == (0, 1)


def test_a_running_job_inherits_nothing_more_from_the_one_it_began_from(store: Store) -> None:
    """Else its priority could only be changed by a cancel, which removes its checkpoints."""
    first = store.jobs.submit(submission())
    begins = settle_predecessors(spec(name="second", lora={"init_from": {"job": first}}), store)
    second = store.jobs.submit(replace(submission(), spec=begins))
    edited(store, first, "publish=false")
    store.attempts.finish(started(store), Reason.OK, "done", Progress(), RESULT)
    assert started(store).job_id == second
    job = edited(store, second, "priority=5")
    assert (job.priority, job.spec["publish"]) == (5, True)
    with pytest.raises(UsageError, match=r"lora\.init_from can't change while job 2 runs"):
        edited(store, second, "lora.init_from=null")
