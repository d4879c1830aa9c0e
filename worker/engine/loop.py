"""The loop of a training: epochs, windows of micro-batches, learn, step, log, evaluate, save, stop.

It calls transformers' callbacks like transformers' Trainer, in the same order and with the same arguments: trackers are
built on them. Rows come in the order of transformers' Trainer for the same seed, so that a job file means the same
everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler, set_seed
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import speed_metrics

from loractl.worker.base.arithmetic import evaluating, random_streams_kept
from loractl.worker.base.gauge import freed, in_batches, in_own_thread, is_out_of_memory, release
from loractl.worker.data.token_rows import lengths_in
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import ForwardPass

from .loss import Loss, LossLog, MicroBatch, window_of
from .optimizer import ScaledOptimizer, make_optimizer
from .saved_state import drop_older, read_snapshot, read_streams, restore_streams, write_snapshot


class RowOrder:
    """The order of the rows. It draws from the streams in use when an epoch begins."""

    def __init__(self, lengths: Sequence[int], args: TrainingArguments) -> None:
        self._lengths = lengths
        self._strategy = args.train_sampling_strategy
        self._seed = args.data_seed
        self._size, self._accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.rows = torch.empty(0, dtype=torch.int64)  # of the epoch that began last

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one epoch; the last may be short."""
        return math.ceil(len(self._lengths) / self._size)

    @property
    def windows(self) -> int:
        """Optimizer steps of one epoch; the last may have fewer micro-batches."""
        return math.ceil(self.micro_batches / self._accumulated)

    @property
    def redrawn(self) -> bool:
        """Whether an epoch's order follows from its number; else a checkpoint must hold it."""
        return self._strategy != "group_by_length"

    def begin(self, epoch: int) -> None:
        """Draw the order of an epoch."""
        torch.empty((), dtype=torch.int64).random_()  # torch's DataLoader draws a number here for its workers
        self.rows = self.draw(epoch)

    def draw(self, epoch: int) -> torch.Tensor:
        count = len(self._lengths)
        if self._strategy == "sequential":
            return torch.arange(count)
        if self._strategy == "random":
            return torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + epoch))
        return torch.tensor(get_length_grouped_indices(self._lengths, self._size * self._accumulated))

    def window(self, number: int) -> list[list[int]]:
        """The rows of each micro-batch of an epoch's window."""
        micro = range(number * self._accumulated, min(self.micro_batches, (number + 1) * self._accumulated))
        return [self.rows[n * self._size : (n + 1) * self._size].tolist() for n in micro]

    def tokens_before(self, step: int) -> int:
        """Tokens of all rows before a step, without padding. The order of the epoch in which it lies must be drawn."""
        epoch, windows = divmod(step, self.windows)
        rows = self.draw(epoch) if self.redrawn else self.rows
        begun = rows[: windows * self._size * self._accumulated].tolist()
        return epoch * sum(self._lengths) + sum(self._lengths[row] for row in begun)

    def tokens_of(self, number: int) -> int:
        """Tokens of an epoch's window, without padding."""
        return sum(self._lengths[row] for rows in self.window(number) for row in rows)


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Rows to train on, and rows held out."""

    train: Sequence[TokenRow]
    held_out: Sequence[TokenRow]


KEPT_CHECKPOINTS = 2

PROGRESS = ("global_step", "max_steps", "epoch", "num_input_tokens_seen", "total_flos", "log_history")
"""The progress in a checkpoint, under the names of transformers' TrainerState."""


class _StopCame(Exception):
    """In the middle of an evaluation."""


class TrainingLoop:
    """One training on a base, with all its own parts: adapter, optimizer, schedule, order of rows, accumulation, clip,
    loss scaler, log, checkpoints and end."""

    def __init__(
        self,
        forward: ForwardPass,
        args: TrainingArguments,
        rows: TrainingRows,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.forward, self.args, self.rows = forward, args, rows
        self.model = forward.model
        set_seed(args.seed)
        if args.activation_checkpointing:
            forward.recompute_blocks((args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        scaler = torch.amp.GradScaler(forward.device.type) if args.fp16 else None
        self.optimizer = ScaledOptimizer(make_optimizer(self.model, args), scaler)
        self.order = RowOrder(lengths_in(self.rows.train), args)
        self.control, self.state = TrainerControl(), self._first_state()
        self._schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=self.optimizer.inner,
            num_warmup_steps=warmup_steps(args, self.state.max_steps),
            num_training_steps=self.state.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        self._events = CallbackHandler(
            [DefaultFlowCallback(), *_trackers(args), *callbacks], self.model, None, self.optimizer, self._schedule
        )
        self._log = LossLog(forward.device)
        self._before: dict[str, Any] = {}  # what a started window changes before its step
        self._saved = 0  # the step of the last checkpoint
        self._resumed: dict[str, Any] | None = None  # the streams of the checkpoint from which it resumes
        self._due = False  # the evaluation of the step from which it resumes
        self._held_out_rows: int | None = None  # of a batch, once more did not fit
        self._in_epoch = False
        self._is_full = False  # memory ran out in a micro-batch
        self._operations = 6 * self.model.num_parameters(exclude_embeddings=True)  # per token, for trackers
        self._began, self._first_step, self._first_epoch = 0.0, 0, 0.0
        self.model.train()
        self._zero()

    @property
    def ended(self) -> bool:
        return self.control.should_training_stop

    @property
    def evaluation_due(self) -> bool:
        """Whether the last step's evaluation is left to the next attempt, since a stop came first."""
        return self.control.should_evaluate

    def run(self) -> None:
        """Train to the end. Errors of the computation, callbacks or files come through."""
        self._begin()
        if self.evaluation_due:
            self._follow_step()
        while not self.ended:
            for batch in self._open_window():
                self._took(batch, self._learn(batch))
                if self.ended and not batch.is_last:
                    self._abandon_window()
                    break
            else:
                self._follow_step()
        self._finish()

    def _follow_step(self) -> None:
        """Evaluate and save where a step asks for it."""
        if self.control.should_evaluate:
            self._evaluate()
        if self.control.should_save:
            self._save()
        if self._in_epoch and (self.ended or self.state.global_step % self.order.windows == 0):
            self._in_epoch = False
            self._tell("on_epoch_end")

    def resume(self, folder: Path) -> None:
        """Resume from a checkpoint. Raises TrainingFailed for one that does not belong to it, and what reading raises.

        Its streams are set now to check that they can be, and again after the callbacks' start, since callbacks may
        draw.
        """
        saved = read_snapshot(self.model, folder)
        self.optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
        for name in PROGRESS:
            if name not in ("max_steps", "num_input_tokens_seen"):  # the job's own: it is the same training
                setattr(self.state, name, saved["progress"][name])
        self._log.restore(saved["log"])
        self.order.rows = saved["order"]
        # an older version's checkpoint has no count
        self.state.num_input_tokens_seen = self.order.tokens_before(self.state.global_step)
        self._resumed = saved["streams"]
        self._due = bool(saved.get("evaluation_due"))  # an older version's has none
        restore_streams(self._resumed, self.forward.device)

    def _finish(self) -> None:
        """Log the totals of the whole run, and let the trackers close what they opened."""
        steps = self.state.global_step - self._first_step
        samples = len(self.rows.train) * (self.state.epoch - self._first_epoch)
        metrics = speed_metrics("train", self._began, num_samples=samples, num_steps=steps)
        self._say(
            {**metrics, "total_flos": self.state.total_flos, "train_loss": self._log.mean(self.state.global_step)}
        )
        self._tell("on_train_end")

    def _first_state(self) -> TrainerState:
        args, windows = self.args, self.order.windows
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * windows)
        state = TrainerState(train_batch_size=args.per_device_train_batch_size, max_steps=steps)
        state.num_train_epochs = math.ceil(steps / windows) if args.max_steps > 0 else math.ceil(args.num_train_epochs)
        state.compute_steps(args, steps)
        return state

    def _begin(self) -> None:
        """Call the callbacks, and go to the first micro-batch."""
        self._began, self._first_step, self._first_epoch = time.time(), self.state.global_step, self.state.epoch
        self._tell("on_init_end")
        self._tell("on_train_begin")
        if self._resumed is not None:
            restore_streams(self._resumed, self.forward.device)
        if self._due:
            self.control.should_evaluate = self.control.should_save = True
            self.control.should_training_stop = self.state.global_step >= self.state.max_steps

    def _open_window(self) -> list[MicroBatch]:
        """The next rows to learn from before a step."""
        epoch, window = divmod(self.state.global_step, self.order.windows)
        log, streams = self._log.state(), read_streams(self.forward.device)
        self._before = {"log": log, "streams": streams, "order": self.order.rows, "flos": self.state.total_flos}
        if not self._in_epoch:
            self._in_epoch = True
            self._tell("on_epoch_begin")
            if window == 0:
                self.order.begin(epoch)
            elif self.order.redrawn:
                self.order.rows = self.order.draw(epoch)
        pieces = [[self.rows.train[n] for n in rows] for rows in self.order.window(window)]
        self._tell("on_step_begin")
        for rows in pieces:
            self.forward.loss.meet(rows)
        return window_of(self.forward.loss, pieces)

    def _learn(self, batch: MicroBatch) -> torch.Tensor:
        """A micro-batch's gradients and loss. If memory runs out, `save_last_step` can still leave a checkpoint."""
        try:
            return self.forward.learn(batch, self.optimizer.backward)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed, self._is_full = freed(error), True
        raise failed  # outside the handler: the error's frames hold tensors

    def save_last_step(self) -> None:
        """After a micro-batch for which there was no memory: leave a checkpoint of the last step. An error of the step
        itself leaves weights and optimizer in between, so that nothing can be saved."""
        if self._is_full:
            self._zero()
            release()
            self.control.should_save = True
            in_own_thread(self._abandon_window)

    def _took(self, batch: MicroBatch, loss: torch.Tensor) -> None:
        """Count the loss of a micro-batch whose gradients exist; after the window's last, take the step."""
        self._log.add(loss)
        self.state.total_flos += self._operations * self.forward.tokens(batch.rows)
        if batch.is_last:
            self._step()
        else:
            self._tell("on_substep_end")

    def _step(self) -> None:
        """Clip, step, schedule, log."""
        norm = self.optimizer.clip(self.trained, self.args.max_grad_norm)
        self._tell("on_pre_optimizer_step")
        self.optimizer.step()
        self._tell("on_optimizer_step")
        rate = self._schedule.get_last_lr()[0]
        if not self.optimizer.step_was_skipped:
            self._schedule.step()
        self._zero()
        epoch, window = divmod(self.state.global_step, self.order.windows)
        done = min(self.order.micro_batches, (window + 1) * self.args.gradient_accumulation_steps)
        self.state.num_input_tokens_seen += self.order.tokens_of(window)
        self.state.global_step += 1
        self.state.epoch = epoch + done / self.order.micro_batches
        self._tell("on_step_end")
        if self.control.should_log:
            mean = self._log.take(self.state.global_step)
            self._say({"loss": mean, "grad_norm": norm.item(), "learning_rate": float(rate)})

    def _abandon_window(self) -> None:
        """Return to the end of the last step: a checkpoint of a half-learned window would need its gradients."""
        self._zero()
        self._log.restore(self._before["log"])
        self.order.rows, self.state.total_flos = self._before["order"], self._before["flos"]
        restore_streams(self._before["streams"], self.forward.device)
        if self.control.should_save and self._saved != self.state.global_step > self._first_step:
            self._save()

    def _evaluate(self) -> None:
        """On the held-out rows, a batch at a time. A stop leaves it to the next attempt."""
        began, rows = time.time(), longest_first(self.rows.held_out)
        batches, sums = list[list[TokenRow]](), list[float]()
        ended, self.control.should_training_stop = self.ended, False  # from here on it says that a stop has come

        def score(chosen: list[int]) -> None:
            batch = [rows[n] for n in chosen]
            self.forward.loss.meet(batch)
            with random_streams_kept():
                with evaluating(self.model):
                    loss = self.forward.held_out_loss(batch)
                self._tell("on_prediction_step")
            sums.append(loss)
            batches.append(batch)

        def look(_: int) -> None:
            if self.ended:
                raise _StopCame

        try:
            asked = self.args.per_device_eval_batch_size
            size = min(asked, self._held_out_rows or asked)
            self._held_out_rows = in_batches(list(range(len(rows))), size, score, in_own_thread, look)
        except _StopCame:
            return
        self.control.should_training_stop = ended
        metrics = speed_metrics("eval", began, num_samples=len(rows), num_steps=len(batches))
        measured = {"eval_loss": mean_loss(self.forward.loss, batches, sums), **metrics}
        with random_streams_kept():
            self._say(measured)
            self._tell("on_evaluate", metrics=measured)

    def _save(self) -> None:
        folder = Path(self.args.output_dir)
        state = {
            "progress": {name: getattr(self.state, name) for name in PROGRESS},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "log": self._log.state(),
            "order": torch.empty(0, dtype=torch.int64) if self.order.redrawn else self.order.rows,
            "streams": read_streams(self.forward.device),
            "evaluation_due": self.evaluation_due,
        }
        write_snapshot(self.model, state, folder / f"checkpoint-{self.state.global_step}")
        self._tell("on_save")
        self._saved = self.state.global_step
        drop_older(folder, KEPT_CHECKPOINTS)  # after the new one is closed: there is always a complete one

    def _say(self, logs: dict[str, Any]) -> None:
        """Add a line to the log, and pass it to trackers."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell("on_log", logs=logs)

    def _tell(self, event: str, **told: Any) -> None:
        self.control = getattr(self._events, event)(self.args, self.state, self.control, **told)

    def _zero(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


def warmup_steps(args: TrainingArguments, steps: int) -> int:
    """Steps of the warm-up. transformers rounds a share of them up, but the first has rate 0: of a training of one step
    nothing would be learned."""
    return 0 if steps == 1 and args.warmup_steps < 1 else args.get_warmup_steps(steps)


def _trackers(args: TrainingArguments) -> list[TrainerCallback]:
    """transformers' callbacks for the job's trackers."""
    if not args.report_to:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    return [kind() for kind in get_reporting_integration_callbacks(args.report_to)]


def longest_first(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """The order in which the report's evaluation takes them, too."""
    return sorted(rows, key=lambda row: -len(row.input_ids))


def mean_loss(loss: Loss, batches: Sequence[Sequence[TokenRow]], sums: Sequence[float]) -> float:
    """The loss per learned token (for a classifier: per row) over all rows, as the report measures it, whatever the
    batch size. `sums`: each batch's summed loss, in nats."""
    return sum(sums) / sum(loss.count(batch) for batch in batches)
