"""Lists that a page shows are read along an index: with 100,000 jobs none of them looks at each row."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from loractl.common.job.status import Status
from loractl.common.job.sweep import NewSweep
from loractl.common.store.database import make_engine
from loractl.common.store.records import Choice, Page
from loractl.common.store.store import Store

from ...factories import NOON, submission

ASKED: dict[str, Callable[[Store], Any]] = {
    "all": lambda store: store.newest(Choice(), Page()),
    "owner": lambda store: store.newest(Choice(user="ada"), Page(after=9)),
    "state": lambda store: store.newest(Choice(status=Status.FAILED), Page(after=9)),
    "name": lambda store: store.newest(Choice(name="tiny"), Page()),
    "label": lambda store: store.newest(Choice(label=("team", "nlp")), Page(after=9)),
    "label and owner": lambda store: store.newest(Choice(user="ada", label=("team", "nlp")), Page()),
    "outcomes": lambda store: store.counts(),
    "attempts": lambda store: store.runs(NOON, NOON + dt.timedelta(seconds=9)),
    "a sweep's losses": lambda store: store.sweep_lines([1]),
    "messages": lambda store: store.traffic(),
    "ended": lambda store: store.ended(NOON, 8),
}


@pytest.mark.parametrize("what", ASKED)
def test_no_list_looks_at_each_row(sqlite_template: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "test.db").write_bytes(sqlite_template.read_bytes())
    engine = make_engine(f"sqlite:///{tmp_path / 'test.db'}")
    store = Store(engine)
    store.submit_sweep(NewSweep(name="grid", user="ada", varied={"lora.r": "8"}), [submission(labels={"team": "nlp"})])
    plans: list[str] = []

    def explain(connection: Any, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.startswith("SELECT"):
            rows = connection.connection.cursor().execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.extend(str(row[-1]) for row in rows)

    event.listen(engine, "after_cursor_execute", explain)
    ASKED[what](store)
    engine.dispose()
    whole = [step for step in plans if step.startswith("SCAN") and "USING" not in step and "ORDER" not in step]
    assert plans and (whole == [] or (what == "all" and whole == ["SCAN jobs"])), plans


def test_a_label_that_is_edited_is_listed_anew(store: Store) -> None:
    from loractl.common.store.records import Amendment

    number = store.submit(submission(labels={"team": "nlp", "n": "1"}))
    other = store.submit(submission(labels={"team": "nlp"}))

    def listed(*label: str) -> list[int]:
        return [job.job_id for job in store.newest(Choice(label=(label[0], label[1])), Page())]

    assert listed("team", "nlp") == [other, number] and listed("n", "1") == [number]
    row = store.job(number)
    seen = (row.status, row.attempt, row.spec)
    changed = submission(labels={"team": "vision"})
    store.edit(Amendment(job_id=number, submission=changed, seen=seen, text="labels", planned_anew=False), "ada")
    assert listed("team", "nlp") == [other] and listed("team", "vision") == [number] and listed("n", "1") == []
