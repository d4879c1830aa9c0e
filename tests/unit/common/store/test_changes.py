"""What a person changes of a job is the same on SQLite, by an update, and on PostgreSQL, by a function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loractl.common.errors import LoractlError
from loractl.common.job.names import Reference
from loractl.common.job.status import Reason
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Job, JobLabel, Tag
from loractl.scheduler.change.amendment import amendment

from ....conftest import examples
from ....databases import KeptDatabase
from ...factories import RESULT, submission, take

pytestmark = pytest.mark.both

OTHER_EACH_TIME = (
    "job_id",
    "submitted_at",
    "started_at",
    "ended_at",
    "lease_expires_at",
    "lora_until",
    "forecasts",  # by what earlier examples took
    "work_left_s",
    "eta_seconds",
    "not_before",
    "token",
)


@pytest.fixture(scope="module")
def both(
    sqlite_template: Path, kept_postgres: KeptDatabase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Store]]:
    file = tmp_path_factory.mktemp("changes") / "loractl.db"
    shutil.copy(sqlite_template, file)
    engines = [make_engine(f"sqlite:///{file}"), make_engine(kept_postgres.url())]
    yield [Store(engine) for engine in engines]
    for engine in engines:
        engine.dispose()
    kept_postgres.empty()


OVERRIDES = (
    "priority=4", "labels={a: b, c: d}", "labels={}", "max_retries=0", "resources.node_labels={gpu: big}", "name=other",
    "training.learning_rate=0.1", "lora_patience=1h", "method=lora", "preemptible=true", "notify=[ops]", "seed=3",
)  # fmt: skip


def edit(override: str) -> Callable[[Store, int], object]:
    return lambda store, job_id: store.jobs.edit(amendment(store, job_id, [override]), "ada")


def finish(reason: Reason) -> Callable[[Store, int], object]:
    def end(store: Store, job_id: int) -> object:
        attempts = store.attempts.of_job(job_id)
        job = store.jobs.get(job_id)
        if not attempts or job.token is None or job.node is None:
            return None
        claim = Claim(
            job_id=job_id, attempt=job.attempt, token=job.token, user=job.user, spec=submission().spec, data={},
            submitted_at=job.submitted_at, method=submission().methods[0], vram_planned=None, vram_reserved=None,
        )  # fmt: skip
        return store.attempts.finish(claim, reason, "told", Progress(), RESULT if reason is Reason.OK else None)

    return end


STEPS: dict[str, Callable[[Store, int], object]] = {
    "cancel": lambda store, job_id: store.jobs.cancel(job_id, "ada"),
    "hold": lambda store, job_id: store.jobs.hold(job_id, "bob", "so: 'that'\n\0"),
    "retry": lambda store, job_id: store.jobs.retry(job_id, "ada"),
    "claim": lambda store, _: take(store, labels={"gpu": "big"}),
    "tag": lambda store, job_id: store.adapters.tag(Reference(job_id=job_id), "prod", "ada"),
    "untag": lambda store, _: store.adapters.untag(Reference(name="tiny", tag="prod"), "bob"),
    **{f"finish {reason.value}": finish(reason) for reason in (Reason.OK, Reason.BAD_DATA, Reason.CANCELLED)},
    **{f"edit {override}": edit(override) for override in OVERRIDES},
    **{
        f"retry {override}": (
            lambda store, job_id, override=override: store.jobs.retry(
                job_id, "ada", amendment(store, job_id, [override])
            )
        )
        for override in OVERRIDES[:3]
    },
}  # fmt: skip


@settings(max_examples=examples(10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=10))
def test_a_person_s_changes_are_the_same_on_both_databases(both: list[Store], steps: list[str]) -> None:
    seen = [_seen(store, store.jobs.submit(submission()), steps) for store in both]
    assert seen[0] == seen[1]


def _seen(store: Store, job_id: int, steps: list[str]) -> dict[str, Any]:
    told = [_said(lambda step=step: STEPS[step](store, job_id), job_id) for step in steps]  # type: ignore[misc]
    job, sweeps = store.jobs.get(job_id), str(job_id)
    row = {name: value for name, value in _columns(job).items() if name not in OTHER_EACH_TIME}
    with store.begin(read_only=True) as tx:
        labels = sorted(
            (label.key, label.value) for label in tx.session.query(JobLabel).where(JobLabel.job_id == job_id)
        )
        tags = sorted((tag.name, tag.tag) for tag in tx.session.query(Tag).where(Tag.job_id == job_id))
    events = [(event.kind, event.attempt, event.text.replace(sweeps, "N")) for event in store.jobs.events(job_id)]
    _leave_nothing(store, job_id)
    return {"told": told, "row": row, "labels": labels, "tags": tags, "events": events}


def _said(step: Callable[[], object], job_id: int) -> str:
    try:
        found = step()
    except LoractlError as error:
        return str(error).replace(str(job_id), "N")
    return type(found).__name__


def _columns(job: Job) -> dict[str, Any]:
    return {column.name: getattr(job, column.key) for column in Job.__table__.columns}


def _leave_nothing(store: Store, job_id: int) -> None:
    """Nothing that waits, runs or is tagged, for the next example."""
    for step in ("finish cancelled", "cancel", "untag"):
        _said(lambda step=step: STEPS[step](store, job_id), job_id)  # type: ignore[misc]
