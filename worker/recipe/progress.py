"""The progress of a training: its steps, its losses and the time they took, recorded and reported to the supervisor,
with how long the rest will take.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from loractl.common.job.status import Stage
from loractl.common.store.records import HELD_OUT_LOSS
from loractl.common.units import duration
from loractl.worker.evaluation.evaluation import Evaluation
from loractl.worker.evaluation.stretches import ENDING_S, Stopwatch, Stretch
from loractl.worker.protocol.log_lines import Pace, begin_text, evaluation_text, step_texts
from loractl.worker.protocol.messages import Stepped

from .run import Run


class Recorder(TrainerCallback):
    """The course of a training so far. Resumed steps and losses belong to it, their seconds do not."""

    def __init__(self, epoch_tokens: int) -> None:
        """`epoch_tokens`: of all rows, without padding."""
        self._epoch_tokens = epoch_tokens
        self.tokens = 0  # without padding, that the adapter was trained on since its first step
        self._first_tokens = 0  # those of earlier attempts
        self._step_began = 0.0
        self.train_losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.first_step = 0
        self.steps = 0  # done so far, including resumed ones
        self.total_steps = 0
        self.seconds = 0.0  # inside steps, without evaluations and checkpoints

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second, without padding, inside this attempt's steps."""
        tokens = self.tokens - self._first_tokens
        return tokens / self.seconds if self.seconds > 0 and tokens > 0 else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step = self.steps = state.global_step
        self.total_steps = state.max_steps
        self.tokens = self._first_tokens = state.num_input_tokens_seen
        self.take_losses(state.log_history)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.monotonic() - self._step_began
        self.steps = state.global_step
        self.tokens = state.num_input_tokens_seen
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
        # an older version's checkpoint has no count: rows have their mean length
        counted = int(state.get("num_input_tokens_seen", round(state["epoch"] * self._epoch_tokens)))
        self.tokens = self._first_tokens = counted
        self.take_losses(state["log_history"])

    def take_losses(self, entries: list[dict[str, Any]]) -> None:
        """The losses before a resume belong to the curve. Raises what malformed entries raise."""
        self.train_losses = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        self.eval_losses = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]


TOLD_EVERY_S = 1.0
"""Seconds between two reported steps; a step with a loss is always reported."""

SAID_EVERY_S = 20.0
"""Seconds between two log lines about an evaluation."""


class Teller(TrainerCallback):
    """Reports steps and losses, and when the job will be done."""

    def __init__(
        self, run: Run, recorder: Recorder, evaluation: Sequence[Stretch] = (), final: Sequence[Stretch] = ()
    ) -> None:
        """`evaluation`: what comes after the last step; `final`: what comes after that."""
        self._run = run
        self._recorder = recorder
        self._evaluation, self._final = list(evaluation), list(final)
        # from one step's end to the next one's: evaluations and checkpoints in between take time too
        self._step_times: deque[float] = deque(maxlen=1000)
        self._step_ended = 0.0
        self._told = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.stage(Stage.TRAINING)
        self._run.phase(begin_text(state.global_step, state.max_steps))
        self._step_ended = time.monotonic()
        self.tell()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.go_on()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._step_times.append(now - self._step_ended)
        self._step_ended = now
        if self._run.stop.came.is_set() or now - self._told > TOLD_EVERY_S:
            self.tell()
        if control.should_evaluate and not control.should_log:
            self._run.say(evaluation_text(self._pace()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        told = ("loss", "eval_loss", "learning_rate", "grad_norm")
        known = {name: float(logs[name]) for name in told if name in logs} if logs else {}
        known = {name: value for name, value in known.items() if math.isfinite(value)}  # a skipped step's gradient
        if known:
            self.tell(known)
        for text in step_texts(known, self._pace()):
            self._run.say(text)
        if "loss" in known and control.should_evaluate:  # after the line of the step that it follows
            self._run.say(evaluation_text(self._pace()))

    def tell(self, metrics: dict[str, float] | None = None) -> None:
        """Report the step that the training has reached."""
        self._told = time.monotonic()
        left, spread = self._left()
        self._tell_step(
            metrics=metrics or {},
            tokens_per_second=self._recorder.tokens_per_second,
            eta_seconds=left,
            eta_spread_seconds=spread,
            peaks=self._run.gauge.look(),
        )

    def _tell_step(self, **more: Any) -> None:
        job_id, recorder = self._run.order.job_id, self._recorder
        self._run.tell(Stepped(job_id=job_id, step=recorder.steps, total_steps=recorder.total_steps, **more))

    def _pace(self) -> Pace:
        return Pace(
            step=self._recorder.steps,
            total_steps=self._recorder.total_steps,
            step_seconds=statistics.fmean(self._step_times) if self._step_times else None,
            tokens_per_second=self._recorder.tokens_per_second,
            left_seconds=self._left()[0],
        )

    def _left(self) -> tuple[float | None, float | None]:
        """Seconds until the job is done, and half the width of their 95% interval."""
        recorder = self._recorder
        left, spread = remaining(self._step_times, recorder.total_steps - recorder.steps)
        if left is not None and recorder.tokens_per_second:
            # A trained token costs a forward and a backward pass, which in LoRA costs about as much again (no gradients
            # of the base's weights): counted as two evaluated tokens. Measured once the evaluation runs.
            left += sum(stretch.tokens for stretch in self._evaluation + self._final) / (2 * recorder.tokens_per_second)
        return left, spread

    def evaluating(self, parts: Sequence[str], *, final: bool = False) -> Callable[[int, int], None]:
        """A progress function for the evaluation: reports how long the rest will take, and names each part as it
        begins.

        `parts`: measured one after the other, each with the same work. `final`: on the final rows.
        """
        said = time.monotonic()
        begun, watch = 0, Stopwatch(self._final if final else self._evaluation + self._final, said)
        self._run.phase(f"evaluates {parts[0]}")

        def tell(done: int, of: int) -> None:
            nonlocal said, begun
            now = time.monotonic()
            watch.lap(done, now)
            known = watch.left_seconds
            left = None if known is None else known + ENDING_S
            if done < of and (part := done * len(parts) // of) != begun:
                begun, said = part, now
                self._run.phase(f"evaluates {parts[part]}")
            elif now - said > SAID_EVERY_S:
                said = now
                self._run.say(f"{done} of {of} rows and answers done   {duration(left)} left")
            self._tell_step(
                eta_seconds=left,
                eta_spread_seconds=left,  # the length of the answers is unknown
                evaluated=done,
                to_evaluate=of,
                peaks=self._run.gauge.look(),
            )

        return tell

    def tell_held_out(self, evaluation: Evaluation) -> None:
        """Report the tuned model's held-out loss: a sweep's jobs are compared by it, without their reports."""
        loss = next((metric.tuned for metric in evaluation.metrics if metric.name == "loss"), math.nan)
        if math.isfinite(loss):
            self._tell_step(metrics={HELD_OUT_LOSS: loss})


def remaining(step_times: Sequence[float], steps: int) -> tuple[float | None, float | None]:
    """Seconds that this many more steps will take, and half the width of their 95% interval.

    The sum of `steps` new times varies by their own spread and by that of the mean of the n measured ones: its variance
    is s² (steps + steps² / n). The quantile is Student's, expanded around the normal one (Abramowitz and Stegun 1964,
    26.7.5). None before a first step, and for the interval before a third.
    """
    n = len(step_times)
    if n == 0:
        return None, None
    mean = statistics.fmean(step_times)
    if n < 3:
        return steps * mean, None
    z, free = 1.96, n - 1
    quantile = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return steps * mean, quantile * statistics.stdev(step_times, mean) * math.sqrt(steps + steps**2 / n)
