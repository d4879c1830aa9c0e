"""The README's lines for a notebook, run from start to end by nbclient, next to a worker."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Cli
from ..models import write_job

nbclient = pytest.importorskip("nbclient", reason="it is in the extra: pip install -e .[notebook]")

CELLS = (
    "import loractl\nlab = loractl.connect()\nlab",
    'job = lab.submit("tiny.yaml", lora={"r": 4})\njob',
    "job.wait()",
    "print(job.report.verdict)\njob.report",
    'job.adapter.pull("support")',
    "lab.job(99)",
)


@pytest.mark.long  # unit/scheduler/python has each call in the test's process
def test_a_notebook_submits_waits_reads_the_report_and_pulls_the_adapter(
    cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbformat.v4 import new_code_cell, new_notebook

    write_job(tmp_path, tiny_model)
    for name, value in cli.environment.items():
        if name.startswith("LORACTL_"):
            monkeypatch.setenv(name, value)
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS])
    worker = cli.start("worker")
    try:
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=resources, allow_errors=True).execute()
    finally:
        worker.send_signal(signal.SIGINT)
        worker.communicate(timeout=60)
    lab, job, wait, report, pull, missing = (cell.outputs for cell in notebook.cells)
    assert lab[-1].data["text/plain"].startswith("<loractl lab of ")
    assert "1 tiny" in _html(job) and any(status in _html(job) for status in ("queued", "running"))
    assert len(wait) == 1, "one table, which is redrawn"
    assert "succeeded" in _html(wait) and " of " in _html(wait), "its steps"
    assert report[0].text.strip() and "held-out loss" in _html(report)
    assert "support" in pull[-1].data["text/plain"] and (tmp_path / "support" / "adapter_model.safetensors").exists()
    assert (missing[-1].ename, missing[-1].evalue) == ("JobNotFound", "there is no job 99")


def _html(outputs: list[Any]) -> str:
    return str(outputs[-1].data["text/html"])
