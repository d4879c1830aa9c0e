"""Early stopping and the best adapter: of a training whose held-out loss falls and then rises."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from loractl.common.job.status import Reason
from loractl.worker.recipe.best import BestKeeper
from loractl.worker.recipe.progress import Recorder
from loractl.worker.recipe.run import Run

from .conftest import Recipe
from .test_options import adapter, losses, notes, report


def test_early_stopping_ends_a_run_that_gets_no_better_and_the_best_adapter_is_kept(
    recipe: Recipe, tmp_path: Path
) -> None:
    worse = _getting_worse(tmp_path)
    asked = {"eval_steps": 1, "max_steps": 30, "load_best_model_at_end": True, "early_stopping_patience": 3}
    same = {"lora": {"lora_dropout": 0.1}, "evaluation": {"samples": 0}}
    ended, told = recipe("a", **asked, **worse, **same)
    assert ended.reason is Reason.OK
    course = losses(told, "eval_loss")
    best = course.index(min(course)) + 1
    assert len(course) == best + 3 < 30 and best > 1, "it is not simply the first"
    found = report(tmp_path / "a")["training"]
    assert (found["stopped_early_at_step"], found["kept_step"]) == (len(course), best)
    assert notes(told, "training") == [
        f"stopped early at step {len(course)}: no better in 3 evaluations",
        f"kept the adapter of step {best}, held-out loss {min(course):.4f}",
    ]
    # the kept adapter is that of a run of so many steps
    recipe("short", **worse, **same, max_steps=best)
    kept, short = adapter(tmp_path / "a"), adapter(tmp_path / "short")
    assert all(torch.equal(kept[name], short[name]) for name in short)


@pytest.mark.long
def test_the_best_adapter_survives_a_resume(recipe: Recipe, tmp_path: Path) -> None:
    worse = _getting_worse(tmp_path)
    asked = {"eval_steps": 1, "max_steps": 13, "load_best_model_at_end": True, "save_steps": 2}
    _, told = recipe("whole", **asked, **worse, evaluation={"samples": 0})
    course = losses(told, "eval_loss")
    best = course.index(min(course)) + 1
    assert 1 < best < 11, "neither the first nor one of the resumed part"
    recipe("first", **asked, **worse, stop_after=best + 2, evaluation={"samples": 0})
    recipe("rest", **asked, **worse, resume="first", evaluation={"samples": 0})
    whole, rest = adapter(tmp_path / "whole"), adapter(tmp_path / "rest")
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    assert report(tmp_path / "rest")["training"]["kept_step"] == best


def test_losses_of_other_held_out_rows_choose_no_adapter_and_end_no_training(recipe: Recipe, tmp_path: Path) -> None:
    """`retry --set evaluation.max_rows`: the rows of the first attempt are easier, by more than training changes."""
    worse = _getting_worse(tmp_path)
    hard = Path(worse["dataset"]["eval_path"])
    easy = [{"role": "user", "content": "ticket 3: it is broken"}, {"role": "assistant", "content": "queue: gpu"}]
    hard.write_text(hard.read_text().splitlines(keepends=True)[0] + json.dumps({"messages": easy}) + "\n")
    asked = {"eval_steps": 1, "max_steps": 12, "load_best_model_at_end": True, "early_stopping_patience": 3, **worse}
    recipe("whole", **asked, evaluation={"samples": 0, "max_rows": 1})
    recipe("first", **asked, stop_after=4, evaluation={"samples": 0})
    _, told = recipe("rest", **asked, resume="first", evaluation={"samples": 0, "max_rows": 1})
    whole, rest = (report(tmp_path / name)["training"] for name in ("whole", "rest"))
    assert rest["eval_losses"] == [
        [step, loss] for step, loss in whole["eval_losses"] if step >= rest["resumed_from_step"]
    ], "the stop left that step's evaluation to this attempt"
    assert rest["kept_step"] == whole["kept_step"] > rest["resumed_from_step"] >= 4
    assert rest["stopped_early_at_step"] == whole["stopped_early_at_step"]
    what = "the held-out losses so far are of other rows than those to come, so they are forgotten"
    assert notes(told, "training")[0] == what


@pytest.mark.long
def test_a_run_that_stopped_early_is_not_trained_on_when_it_is_taken_up(recipe: Recipe, tmp_path: Path) -> None:
    worse = _getting_worse(tmp_path)
    asked = {"eval_steps": 1, "max_steps": 30, "early_stopping_patience": 2}
    recipe("first", **asked, **worse, evaluation={"samples": 0})
    _, told = recipe("rest", **asked, **worse, resume="first", evaluation={"samples": 0})
    assert losses(told) == []
    steps = [report(tmp_path / name)["training"]["steps"] for name in ("first", "rest")]
    assert steps[0] == steps[1] < 30


def test_a_training_is_over_by_its_last_step_or_early_and_not_by_a_stop(tmp_path: Path) -> None:
    order = SimpleNamespace(checkpoint_dir=str(tmp_path))
    best = BestKeeper(cast(Run, SimpleNamespace(order=order)), Recorder(0))
    early, last = (SimpleNamespace(global_step=step, max_steps=12) for step in (4, 12))
    assert (best.is_over(early), best.is_over(last)) == (False, True)
    best.read_finished(tmp_path, vars(early))
    assert best.is_over(early) and best.stopped_early == 4


def _getting_worse(folder: Path) -> dict[str, Any]:
    """Held-out rows with answers of letters that no other row has: their loss falls by 0.2 while the marks of every
    answer are learned, until step 6 or so, and then rises with each step, as the letters become ever less likely."""
    said = [
        {"role": "user", "content": "ticket 99: it is broken"},
        {"role": "assistant", "content": "ZQ JX 98 ZJ QX 89"},
    ]
    rows = [said, [{**said[0], "content": "ticket 98: it is broken"}, said[1]]]
    path = folder / "contrary.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return {"dataset": {"eval_path": str(path)}, "lr_scheduler_type": "constant", "warmup_steps": 0}
