"""Base model and data by hub id: a real worker fetches them from a hub of one's own, and needs it only once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..hub import Hub
from ..models import make_tiny_model, write_helpdesk, write_job

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: rows/january.jsonl}
  - {split: test, path: rows/held.jsonl}
---
The split files have names of their own; rows/other.jsonl belongs to none.
"""


@pytest.mark.long
def test_hub_ids_are_fetched_once_pinned_in_the_report_and_taken_from_the_cache_while_the_hub_is_away(
    make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path
) -> None:
    hub = Hub(tmp_path / "hub")
    wanted = hub.commit("models", "org/tiny", tiny_model, branch="v1")
    hub.commit("models", "org/tiny", make_tiny_model(tmp_path / "wider", hidden=96))  # what main means now
    rows = write_helpdesk(tmp_path / "rows.jsonl", 36).read_text().splitlines(keepends=True)
    files = {"README.md": CARD, "rows/january.jsonl": "".join(rows[:24]), "rows/held.jsonl": "".join(rows[24:])}
    data = hub.commit("datasets", "org/desk", {**files, "rows/other.jsonl": '{"text": "of another kind"}\n'})
    job = write_job(tmp_path, Path("org/tiny"), data="org/desk, eval_path: org/desk", extra="revision: v1\n")
    with hub.serving() as url:
        cli = make_cli(HF_ENDPOINT=url, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0")
        cli("submit", job, "--set=max_retries=0")
        cli("worker", "--drain-when-idle", timeout=180)
        first = json.loads(cli("report", 1, "--json").stdout)
    assert first["base"]["commit"] == wanted
    weights = hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    assert first["base"]["files"]["model.safetensors"] == weights
    assert first["data"]["commits"] == {"path": data, "eval_path": data}
    assert (first["data"]["train_rows"], first["data"]["held_out_rows"]) == (24, 12)
    config = hub.find("models", "org/tiny", "main")[0]
    assert not any(config in request.path for request in hub.requests), "nothing of main was asked for"

    again = json.loads(cli("reproduce", 1, "--json").stdout)
    assert (again["spec"]["revision"], again["spec"]["dataset"]["path"]) == (wanted, f"org/desk@{data}")
    cli("worker", "--drain-when-idle", timeout=180)  # the hub is away
    assert "2 came out the same as 1" in cli("reproduce", 1, "--check", 2).stdout

    nowhere = cli.with_environment(HF_HOME=str(tmp_path / "nowhere"))
    nowhere("submit", job)
    store = Store(connect(load_settings(cli.environment)))
    planned = [store.jobs.get(job_id).vram_lora for job_id in (1, 2, 3)]
    assert planned[0] is not None, "unknown at submit; the trainer told it once the config was there"
    assert planned[1] is not None, "planned at submit from the cached config of that commit"
    assert planned[2] is None, "a client without the config knows no need: the job takes an empty card"
