"""Which stored adapters a job may begin from."""

from __future__ import annotations

from typing import Any

import pytest

from loractl.common.job.ancestor import misfits
from loractl.common.job.spec import JobSpec


def job(**keys: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "tiny", "base_model": "org/model", "dataset": {"path": "org/data"}, **keys})


@pytest.mark.parametrize("task", ["CAUSAL_LM", "preference"])
def test_preferences_go_on_from_answers_and_from_preferences(task: str) -> None:
    assert misfits(job(task_type="preference"), job(task_type=task)) == []
    assert misfits(job(task_type=task), job(task_type="preference")) == []


def test_no_answers_begin_from_a_classifier() -> None:
    (wrong,) = misfits(job(task_type="preference"), job(task_type="SEQ_CLS"))
    assert wrong == "task_type is preference, and that adapter's SEQ_CLS"
