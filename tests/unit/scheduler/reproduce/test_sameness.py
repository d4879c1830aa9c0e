"""Two finished jobs came out the same only if weights and all that was measured are equal to the last digit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loractl.common.errors import UsageError
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.compare.answer import FinishedJob
from loractl.scheduler.reproduce import sameness
from loractl.scheduler.reproduce.command import reproduce
from loractl.scheduler.reproduce.sameness import compare_results
from loractl.scheduler.reproduce.text import sameness_text

SCREEN = Screen(width=120, unicode=True, color=False)


def job(job_id: int, **changed: Any) -> FinishedJob:
    """A finished job; `changed` names places in its report, like training__device."""
    report: dict[str, Any] = {
        "job": {"job_id": job_id, "device_name": "NVIDIA A40"},
        "method": "lora",
        "base": {"sha256": "b" * 64},
        "adapter": {"sha256": "a" * 64},
        "data": {"train_rows_sha256": "d" * 64, "held_out_sha256": "e" * 64},
        "versions": {"torch": "2.13.0"},
        "training": {
            "losses": [[1, 3.5], [2, 3.0], [3, 2.5]], "threads": 4, "device": "cuda", "precision": "bfloat16",
            "optim": "adamw_torch", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
            "gradient_checkpointing": True, "per_device_eval_batch_size": 8, "steps": 3,
        },
        "evaluation": {
            "metrics": [{"name": "loss", "label": "loss", "base": 4.0, "tuned": 2.0}],
            "row_losses": [[3, 10, 40.0, 20.0], [7, 12, 48.0, 24.0]],
        },
    }  # fmt: skip
    report = copy.deepcopy(report)
    settings = changed.pop("spec", {})
    for place, value in changed.items():
        *path, last = place.split("__")
        inner = report
        for key in path:
            inner = inner[key]
        inner[last] = value
    return FinishedJob(job_id=job_id, spec={"name": f"run-{job_id}", **settings}, report=report)


def test_equal_jobs_are_the_same_in_one_sentence() -> None:
    found = compare_results(job(1), job(2, training__threads=2))
    assert found.same and found.ran_with == (), "on a card the box's threads decide nothing"
    assert sameness_text(found, SCREEN) == (
        "2 came out the same as 1: the adapters are equal bit for bit (sha256 aaaaaaaaaaaa), and so are the losses on "
        "2 held-out rows."
    )


def test_jobs_that_trained_beside_one_are_named_on_every_device() -> None:
    def beside(device: str, precision: str) -> list[tuple[str, object, object]]:
        how = {"training__device": device, "training__precision": precision, "adapter__sha256": "f" * 64}
        found = compare_results(
            job(1, **how, training__companions=[3, 4]), job(2, **{**how, "adapter__sha256": "a" * 64})
        )
        return [(pair.what, pair.first, pair.second) for pair in found.ran_with]

    for device, precision in (("cuda", "float32"), ("cpu", "bfloat16"), ("cpu", "float32")):
        assert beside(device, precision) == [("other jobs in its trainer", "3, 4", "none")], (device, precision)


@pytest.mark.parametrize(("hashed", "code"), [("a", 0), ("f", 1)])
def test_the_exit_status_tells_a_script(hashed: str, code: int, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    finished = {1: job(1), 2: job(2, adapter__sha256=hashed * 64)}
    monkeypatch.setattr(sameness, "finished_job", lambda store, artifacts, job_id: finished[job_id])
    runner = CliRunner(env={"LORACTL_HOME": str(home)})
    assert runner.invoke(reproduce, ["1", "--check", "2"]).exit_code == code


def test_a_different_adapter_is_measured_by_what_it_does() -> None:
    rows = [[3, 10, 40.0, 20.0], [7, 12, 48.0, 23.5]]
    metrics = [{"name": "loss", "label": "loss", "base": 4.0, "tuned": 1.977}]
    other = job(
        2,
        adapter__sha256="f" * 64,
        evaluation__row_losses=rows,
        evaluation__metrics=metrics,
        training__losses=[[1, 3.5], [2, 3.25], [3, 2.5]],
        versions={"torch": "2.14.0"},
        spec={"training": {"seed": 1}},
    )
    found = compare_results(job(1, spec={"training": {"seed": 0}}), other)
    assert not found.same and found.parted_at == 2
    assert found.row_losses is not None
    assert (found.row_losses.equal, found.row_losses.largest, found.row_losses.row) == (1, 0.5, 7)
    assert {pair.what for pair in found.ran_with} == {"torch", "training.seed"}
    text = sameness_text(found, SCREEN)
    for expected in (
        "2 did not come out the same as 1.", "−0.023", "of row 7", "diverge at step 2", "aaaaaaaaaaaa", "ffffffffffff",
    ):  # fmt: skip
        assert expected in text


def test_equal_weights_that_were_measured_otherwise_are_said_to_be_so() -> None:
    found = compare_results(job(1), job(2, evaluation__row_losses=[[3, 10, 40.0, 20.0], [7, 12, 48.0, None]]))
    assert not found.same
    text = sameness_text(found, SCREEN)
    assert "the adapters are equal, their measurements are not" in text
    assert "the largest difference is not finite" in text
    assert "The reports show no difference" in text
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["row_losses"]["largest"] is None


def test_other_final_rows_are_named() -> None:
    found = compare_results(job(1, data__final_sha256="f" * 64), job(2, data__final_sha256="0" * 64))
    assert [pair.what for pair in found.ran_with] == ["final rows"]


def test_other_held_out_rows_are_never_the_same() -> None:
    found = compare_results(job(1), job(2, data__held_out_sha256="0" * 64))
    assert not found.same and found.row_losses is None
    assert "measured on other held-out rows" in sameness_text(found, SCREEN)


def test_jobs_of_two_kinds_of_training_are_refused() -> None:
    """Their losses have other meanings, even where their adapters are equal byte by byte."""
    with pytest.raises(UsageError, match="jobs 1 and 2 learn different tasks, so their losses can't be compared"):
        compare_results(job(1), job(2, spec={"task_type": "preference"}))


def test_a_fixed_choice_is_compared_by_what_ran_and_not_by_what_was_written() -> None:
    asked = {"method": "auto", "lora_patience": 60.0, "training": {"dtype": "auto", "optim": "auto"}}
    fixed = {"method": "lora", "lora_patience": None, "training": {"dtype": "bfloat16", "optim": "adamw_torch"}}
    assert compare_results(job(1, spec=asked), job(2, spec=fixed)).ran_with == ()
    found = compare_results(job(1, spec=asked), job(2, spec=fixed, method="qlora", training__precision="float16"))
    assert {pair.what for pair in found.ran_with} == {"method", "number format"}


def test_what_a_report_of_an_earlier_version_does_not_say_is_shown_as_missing() -> None:
    older = job(1)
    del older.report["base"], older.report["training"]["gradient_checkpointing"]
    found = compare_results(older, job(2, adapter__sha256="f" * 64))
    assert {pair.what: pair.first for pair in found.ran_with} == {"base model": None, "checkpointing": None}
    assert "base model     –" in sameness_text(found, SCREEN)
