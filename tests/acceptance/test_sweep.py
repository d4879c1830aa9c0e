"""A sweep on a real worker: losers really stop, steps are saved, and the winner is that of the sweep run in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Cli
from ..models import make_tiny_model, write_helpdesk

STEPS = 20
RATES = "3e-3,1e-4,3e-6,1e-7"
"""Far apart, so that the loss at a quarter of the steps says which is better."""


@pytest.mark.long
def test_losers_stop_and_the_winner_is_that_of_all_members_run_to_their_end(
    make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    """The stopped members are run to their end afterwards: then it is the same sweep in full."""
    cli = make_cli(LORACTL_DEVICES="sim:8GiB,8GiB")
    cli("sweep", _job(tmp_path), "--set", f"training.learning_rate={RATES}", "--early-stop")
    cli("worker", "--drain-when-idle", timeout=280)
    early = json.loads(cli("status", "--sweep", 1, "--json").stdout)
    stopped = [member for member in early["members"] if member["reason"] == "pruned"]
    assert early["ended"] and early["stopped"] == len(stopped) >= 2
    assert early["stopped"] + early["done"] == 4
    for member in stopped:
        assert member["status"] == "cancelled" and member["step"] < member["total_steps"] == STEPS
        assert member["rungs"] and member["final_loss"] is None
        assert "or less would have continued" in member["message"]
    assert early["saved_steps"] == sum(STEPS - member["step"] for member in stopped) > 0
    assert early["total_steps"] == 4 * STEPS
    told = cli("compare", "--sweep", 1).stdout
    assert told.startswith(f"Best: {early['best_job_id']} (learning_rate 0.003), held-out loss ")
    assert "Stopped early:" in told and "STOPPED AT" in told

    cli("retry", *(member["job_id"] for member in stopped))
    cli("worker", "--drain-when-idle", timeout=280)
    full = json.loads(cli("status", "--sweep", 1, "--json").stdout)
    assert (full["done"], full["stopped"], full["saved_steps"]) == (4, 0, 0), "a retried member is not stopped again"
    assert full["best_job_id"] == early["best_job_id"]
    rungs = {member["job_id"]: member["rungs"] for member in early["members"]}
    assert all(member["rungs"] == rungs[member["job_id"]] for member in full["members"])
    reports = [json.loads(cli("report", member["job_id"], "--json").stdout)["evaluation"] for member in stopped]
    assert all(one["base_measured_by_job"] is not None for one in reports), "members before them have measured the base"


def _job(folder: Path) -> Path:
    """Steps that last long enough for a stop to come before the end."""
    make_tiny_model(folder / "model", layers=3, hidden=128)
    write_helpdesk(folder / "data.jsonl", rows=120)
    (folder / "triage.yaml").write_text(
        f"name: triage\nbase_model: {folder / 'model'}\nmethod: lora\n"
        "dataset: {path: data.jsonl, max_length: 128, test_size: 0.1}\nlora: {r: 4, lora_dropout: 0}\n"
        f"training: {{max_steps: {STEPS}, per_device_train_batch_size: 8, gradient_accumulation_steps: 1, "
        "save_steps: 1000}\nevaluation: {samples: 0}\n"
    )
    return folder / "triage.yaml"
