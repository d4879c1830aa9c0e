"""A worker that ends when no job is left for its box, and says which others are left."""

from __future__ import annotations

from pathlib import Path

from ..conftest import Cli
from ..models import write_helpdesk


def test_a_job_for_other_boxes_and_a_held_one_keep_no_worker_and_are_named(cli: Cli, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    labelled = ("submit", tmp_path / "job.yaml", "--set", "resources.node_labels.nvlink='yes'")
    for args in (labelled, labelled, ("submit", tmp_path / "job.yaml"), ("hold", 3)):
        cli(*args)
    said = cli("worker", "--drain-when-idle", timeout=60).stderr
    assert said.splitlines()[-1] == "No job that fits this box is left: 1, 2 wait for another box, 3 is held."
