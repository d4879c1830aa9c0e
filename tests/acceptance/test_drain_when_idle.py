"""A worker that ends when no job is left for its box, and says which others are left."""

from __future__ import annotations

from pathlib import Path

import pytest

from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_helpdesk
from ..unit.factories import submission


def test_a_job_for_other_boxes_and_a_held_one_keep_no_worker_and_are_named(cli: Cli, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    labelled = ("submit", tmp_path / "job.yaml", "--set", "resources.node_labels.nvlink='yes'")
    for args in (labelled, labelled, ("submit", tmp_path / "job.yaml"), ("hold", 3)):
        cli(*args)
    said = cli("worker", "--drain-when-idle", timeout=60).stderr
    assert said.splitlines()[-1] == "No job that fits this box is left: 1, 2 wait for another box, 3 is held."


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("heron:1", "heron:1, which is drained"),
        ("heron", "heron:0, which is drained, or for heron:1, which is drained"),
    ],
)
def test_nor_does_one_that_only_a_drained_card_could_take(cli: Cli, target: str, named: str) -> None:
    drained = cli.with_environment(LORACTL_HOST="heron", LORACTL_DEVICES="sim:8GiB,24GiB")
    engine = connect(load_settings(drained.environment))
    store = Store(engine)
    store.submit(submission(lora=12, qlora=12))
    store.drain(target, "ada", "new driver")
    engine.dispose()
    said = drained("worker", "--drain-when-idle", timeout=60).stderr
    assert said.splitlines()[-1] == f"No job that fits this box is left: 1 waits for another box, or for {named}."
