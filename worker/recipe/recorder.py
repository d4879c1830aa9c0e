"""Records what happens in a training: its steps, its losses, and the time they took."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Recorder(TrainerCallback):
    """The course of a training so far. Resumed steps and losses belong to it, their seconds do not."""

    def __init__(self, epoch_tokens: int) -> None:
        self._epoch_tokens = epoch_tokens  # without padding
        self._epochs = 0.0  # passed so far, including resumed ones
        self._first_epoch = 0.0
        self._step_began = 0.0
        self.train_losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.first_step = 0
        self.steps = 0  # done so far, including resumed ones
        self.total_steps = 0
        self.seconds = 0.0  # inside steps, without evaluations and checkpoints

    @property
    def tokens(self) -> int:
        """Tokens, without padding, that the adapter was trained on since its first step."""
        return round(self._epochs * self._epoch_tokens)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second, without padding, inside this attempt's steps."""
        tokens = (self._epochs - self._first_epoch) * self._epoch_tokens
        return tokens / self.seconds if self.seconds > 0 and tokens > 0 else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step = self.steps = state.global_step
        self.total_steps = state.max_steps
        self._epochs = self._first_epoch = state.epoch or 0.0
        self.take_losses(state.log_history)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.monotonic() - self._step_began
        self.steps = state.global_step
        # the share of epochs passed counts each epoch's short last batch correctly
        self._epochs = state.epoch
        control.should_log |= state.global_step >= state.max_steps  # the last loss belongs to the curve

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.train_losses.append((state.global_step, logs["loss"]))
        if "eval_loss" in logs:
            self.eval_losses.append((state.global_step, logs["eval_loss"]))

    def read_finished(self, state: dict[str, Any]) -> None:
        """Load the course of a finished training from its last checkpoint's progress."""
        self.first_step = self.steps = self.total_steps = state["global_step"]
        self._epochs = self._first_epoch = state["epoch"]
        self.take_losses(state["log_history"])

    def take_losses(self, entries: list[dict[str, Any]]) -> None:
        """The losses before a resume belong to the curve. Raises what malformed entries raise."""
        self.train_losses = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        self.eval_losses = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
