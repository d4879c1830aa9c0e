"""What `adapters delete` says of an adapter that another job holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

from loractl.common.errors import WrongState
from loractl.common.job.names import Reference
from loractl.common.job.status import Reason
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.scheduler.adapters.command import delete

from ...factories import RESULT, spec, submission, take


def test_the_job_that_is_to_start_after_it_is_named(upgraded_home: Path) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    first, other = (store.jobs.submit(submission()) for _ in range(2))
    behind = store.jobs.submit(submission(after=[other, first]))
    begun = spec(after=[other, first], lora={"init_from": str(other)})
    needs = store.jobs.submit(replace(submission(), spec=begun))
    store.jobs.submit(submission(after=[behind]))
    claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == first
    store.attempts.finish(claim, Reason.OK, "done", Progress(), RESULT)
    told = CliRunner(env=environment).invoke(delete, [str(first), "--yes"])
    assert isinstance(told.exception, WrongState)
    assert told.exception.sentence == f"job {behind} is to start after job {first}, whose adapter it may read"
    assert told.exception.hint == f"wait for it, cancel it, or: loractl edit {behind} --set after=[]"
    store.jobs.cancel(behind, "ada")
    told = CliRunner(env=environment).invoke(delete, [str(first), "--yes"])
    assert isinstance(told.exception, WrongState) and told.exception.sentence.startswith(f"job {needs} ")
    assert told.exception.hint == "wait for it, or cancel it", "it needs the adapter of the other"


def test_a_tagged_one_is_kept(upgraded_home: Path) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, Reason.OK, "done", Progress(), RESULT)
    adapter, _ = store.adapters.tag(Reference(job_id=job_id), "paper", "ada")
    told = CliRunner(env=environment).invoke(delete, [str(job_id), "--yes"])
    assert isinstance(told.exception, WrongState)
    assert f"is tagged {adapter.name}:paper" in told.exception.sentence
    assert f"loractl adapters untag {adapter.name}:paper" in (told.exception.hint or "")
    assert [one.job_id for one in store.adapters.all()] == [job_id]
