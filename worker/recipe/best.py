"""The best evaluation in mid-training: its adapter is kept, and early stopping counts from it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback

from loractl.common.job.identity import data_digest
from loractl.worker.base.adapter import load_weights, save_weights
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.row_forms import form_of

from .progress import Recorder
from .run import Run

BEST = "best.json"
BEST_WEIGHTS = "best_adapter.safetensors"
"""Names in a checkpoint: the best evaluation so far, and its adapter if the job asks for the best one."""


class BestKeeper(TrainerCallback):
    """Knows the best evaluation so far, and keeps its adapter on the disk if the job asks for the best one."""

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self._run = run
        self._recorder = recorder
        self._file = Path(run.order.checkpoint_dir) / BEST_WEIGHTS
        self._best: tuple[int, float] | None = None  # (step, held-out loss)
        self.stopped_early: int | None = None  # the step at which early stopping ended the training
        self._measured: str | None = None  # the digest of the held-out rows
        self._forgets = False  # the checkpoint's evaluations, which were of other rows

    def measures(self, data: PreparedData) -> None:
        """Learn on which rows the losses will be; a checkpoint names them."""
        asked, form = self._run.spec, form_of(data.format)
        if asked.training.eval_steps is not None:
            texts = (text for row in data.held_out.rows.first(asked.evaluation.max_rows) for text in form.texts(row))
            self._measured = data_digest([text.input_ids, text.labels, text.label] for text in texts)

    @property
    def kept_step(self) -> int:
        """The step of the training's final adapter."""
        if self._best is not None and self._run.spec.training.load_best_model_at_end:
            return self._best[0]
        return self._recorder.steps

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Keep the best adapter, and end a training that no longer improves."""
        asked, loss = self._run.spec.training, (metrics or {}).get("eval_loss", math.nan)
        if self._best is None or loss < self._best[1]:
            self._best = (state.global_step, loss)
            if asked.load_best_model_at_end:
                save_weights(model, self._file)
        since = sum(step > self._best[0] for step, _ in self._recorder.eval_losses)
        if asked.early_stopping_patience is not None and since >= asked.early_stopping_patience:
            self.stopped_early = state.global_step
            control.should_training_stop = control.should_save = True

    def is_over(self, state: Any) -> bool:
        """Whether no step follows: the last one is done, or the training ended early, which a stop is not."""
        return state.global_step >= state.max_steps or self.stopped_early is not None

    def take(self, model: Any) -> None:
        """Replace the last adapter with the best evaluation's, if the job asks for it, and report that."""
        asked = self._run.spec.training
        if self.stopped_early is not None:
            text = (
                f"stopped early at step {self.stopped_early}: no better in {asked.early_stopping_patience} evaluations"
            )
            self._run.note("training", text)
        if not asked.load_best_model_at_end or self._best is None:
            return
        load_weights(model, self._file)
        self._run.note("training", f"kept the adapter of step {self._best[0]}, held-out loss {self._best[1]:.4f}")

    def store(self, folder: Path) -> None:
        """Save the best so far in a checkpoint."""
        if self._best is None:
            return
        best = {"step": self._best[0], "loss": self._best[1], "rows": self._measured}
        (folder / BEST).write_text(json.dumps(best))
        if self._file.exists():
            shutil.copyfile(self._file, folder / BEST_WEIGHTS)

    def read_finished(self, folder: Path, state: dict[str, Any]) -> None:
        """Load it from the last checkpoint of a finished training; `state`: the checkpoint's progress. One that was
        over before its last step had ended early."""
        if state["global_step"] < state["max_steps"]:
            self.stopped_early = state["global_step"]
        self._load(folder)

    def bring(self, folder: Path) -> None:
        """Load the best before a checkpoint: a resume must not take a worse one. One that was measured on other rows is
        on another scale, so it is forgotten. Raises what reading raises."""
        told = folder / BEST
        best = json.loads(told.read_text()) if told.exists() else {}
        if best.get("rows", self._measured) == self._measured:  # earlier versions did not store it
            self._load(folder)
            return
        if not self._forgets:
            what = "the held-out losses so far are of other rows than those to come, so they are forgotten"
            self._run.note("training", what)
        self._forgets = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._forgets:
            state.log_history[:] = [entry for entry in state.log_history if "eval_loss" not in entry]
            self._recorder.take_losses(state.log_history)

    def _load(self, folder: Path) -> None:
        if (told := folder / BEST).exists():
            best = json.loads(told.read_text())
            self._best = (best["step"], best["loss"])
        if (weights := folder / BEST_WEIGHTS).exists():
            load_file(weights)  # it is needed only at the end: too late to find that it can't be read
            self._file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(weights, self._file)
