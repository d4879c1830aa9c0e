"""The adapter that a job begins from, as submit finds it: what it forbids is forbidden for good."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.fingerprint import MERGED
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.scheduler.submit.ancestor import settle_predecessors

from ....databases import SQLITE_ALONE
from ...factories import RESULT, spec, submission, take

pytestmark = SQLITE_ALONE


def finished(store: Store, **keys: Any) -> int:
    """A job that has succeeded, with the spec that submit stores."""
    job_id = store.jobs.submit(replace(submission(), spec=settle_predecessors(spec(**keys), store)))
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, Reason.OK, "done", Progress(), RESULT)
    return job_id


def test_what_begins_from_an_adapter_that_must_stay_in_the_lab_must_stay_too(store: Store) -> None:
    """Whatever becomes of the name, the tag and the row of the first one: each job's own row says it."""
    first = finished(store, name="secret", publish=False)
    second = finished(store, name="open", publish=True, lora={"init_from": "secret"})
    finished(store, name="secret")  # the name means another adapter now
    assert store.results.remove(first, "ada", "loractl adapters delete")
    third = finished(store, name="grandchild", lora={"init_from": "open"})
    assert [store.jobs.get(job_id).spec["publish"] for job_id in (second, third)] == [False, False]
    assert settle_predecessors(spec(lora={"init_from": "secret"}), store).publish, "of the newer one of that name"


def test_a_job_of_before_the_key_may_be_published(store: Store) -> None:
    stored = spec().model_dump(mode="json")
    del stored["publish"]
    assert JobSpec.model_validate(stored).publish
    assert settle_predecessors(spec(lora={"init_from": str(finished(store))}), store).publish


@pytest.mark.parametrize(
    ("told", "allowed"),
    [({"publish": False}, False), ({"publish": True}, True), ({}, True), ([], True), ("no JSON", True)],
)
def test_a_base_into_which_such_an_adapter_was_merged_forbids_it_too(
    store: Store, tmp_path: Path, told: Any, allowed: bool
) -> None:
    (tmp_path / MERGED).write_text(told if isinstance(told, str) else json.dumps(told))
    assert settle_predecessors(spec(base_model=str(tmp_path)), store).publish is allowed
