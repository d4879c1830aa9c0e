"""Rows as a hostile client writes them, past submit's checks: the worker refuses them, each in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import ValueRefused
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_helpdesk, write_job
from ..unit.factories import submission


def test_a_row_can_make_a_worker_read_only_what_its_owner_allows(
    make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path
) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    shutil.copytree(tiny_model, allowed / "base")
    shutil.copytree(tiny_model, outside / "base")
    (allowed / "link").symlink_to(outside / "base")
    secret = write_helpdesk(tmp_path / "secret.jsonl")
    cli = make_cli(LORACTL_MODEL_ROOTS=str(allowed))
    cli("submit", write_job(tmp_path, allowed / "base", name="good"))

    settings = load_settings(cli.environment)
    engine = connect(settings)
    store = Store(engine)
    good = store.jobs.get(1)

    def forge(base: object, path: object = "org/data", data: dict[str, Any] | None = None) -> int:
        made = submission(base_model=str(base), dataset={"path": str(path)}, max_retries=0)
        return store.jobs.submit(replace(made, data=data or {}))

    refused = {
        forge(outside / "base", data=good.data): "LORACTL_MODEL_ROOTS",
        forge(allowed / "link", data=good.data): "LORACTL_MODEL_ROOTS",
        forge(allowed / ".." / "outside" / "base", data=good.data): "is not a plain path",
        forge("../base", data=good.data): "neither an absolute path nor a hub id",
        forge(allowed / "base", secret): "is not in the artifact store",
        forge(allowed / "base", "json"): "is not in the artifact store",
        forge(allowed / "base", data={"path": {"uri": secret.as_uri(), "sha256": good.data["path"]["sha256"]}}): (
            "is not a data set of this store"
        ),
    }
    for unreadable in ({"path": {"uri": 1}}, {"path": "x"}):
        with pytest.raises(ValueRefused, match="refuses the value of data"):
            forge(allowed / "base", data=unreadable)
    cli("worker", "--drain-when-idle", timeout=200)
    for job_id, why in refused.items():
        job = store.jobs.get(job_id)
        assert job.status.value == "failed", (job_id, job.status, job.message)
        assert why in (job.message or ""), (job_id, job.message)
        assert all(attempt.reason is not None for attempt in store.attempts.of_job(job_id))
    assert store.jobs.get(1).status.value == "succeeded"
    assert json.loads(cli("report", 1, "--json").stdout)["base_model"] == str(allowed / "base")
    engine.dispose()
