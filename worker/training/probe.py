"""The longest batches of a job, tried before its first step: what does not fit is known within a minute.

The probe takes part in a Trainer's run as a callback, when model, optimizer and autocast are as the steps will find
them. It leaves no trace: weights, optimizer, gradients and random numbers are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from loractl.common.memory.optimizer import state_bytes
from loractl.worker.base.arithmetic import evaluating, random_streams_kept
from loractl.worker.base.batches import in_batches
from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory
from loractl.worker.data.batch import inputs_of
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.tokens import TokenRow
from loractl.worker.evaluation.classifier import classify
from loractl.worker.evaluation.losses import score_rows

PROCESSOR_ROOM_BYTES = 128 * 2**20
"""Held during the probe on a CPU, in place of what libraries keep after some steps: 60 to 140 MiB of compiled kernels
in oneDNN's cache were seen. A first step does not hold them yet."""


class DoesNotFit(Exception):
    """A batch of the training ran out of memory before the run began."""


class Probe(TrainerCallback):
    """Tries a training step on the longest rows, then the evaluation's longest batch.

    Where the latter does not fit it is made smaller, and `on_eval_batch` is told the rows that fit. Raises DoesNotFit
    where the training does not fit, and out-of-memory as it is where evaluating a single row does not.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Any,
        data: PreparedData,
        max_rows: int | None,
        on_eval_batch: Callable[[int], None],
    ) -> None:
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._data = data
        self._max_rows = max_rows
        self._on_eval_batch = on_eval_batch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        failure = None
        with random_streams_kept(), _held(_bytes_to_come(trainer), args.device):
            try:
                _try_step(trainer, longest(self._data.trained_rows, args.per_device_train_batch_size))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = in_a_sentence(error)
            finally:
                trainer.model.zero_grad()
            if failure is None:
                self._try_evaluation(trainer)
        if failure is not None:
            raise DoesNotFit(failure)  # outside of the handler: the error's traceback holds the batch's tensors

    def _try_evaluation(self, trainer: Trainer) -> None:
        """A batch as the Trainer evaluates in mid-training, where it does, and as the report's evaluation does."""
        in_training = trainer.args.eval_strategy != "no"
        rows = self._data.held_out.rows if in_training else self._data.held_out.rows[: self._max_rows]
        wanted = trainer.args.per_device_eval_batch_size
        batch = longest(rows, wanted)

        def work(chosen: list[int]) -> None:
            picked = [batch[i] for i in chosen]
            if in_training:
                trainer.prediction_step(
                    trainer.model, trainer.data_collator([inputs_of(row) for row in picked]), prediction_loss_only=True
                )
            if self._data.label_names:
                classify(trainer.model, self._tokenizer.pad_token_id, picked, len(picked))
            else:
                score_rows(trainer.model, self._tokenizer, picked, len(picked))

        with evaluating(trainer.model):
            fitting = in_batches(list(range(len(batch))), wanted, work)
        if fitting != wanted:
            trainer.args.per_device_eval_batch_size = fitting
            self._on_eval_batch(fitting)


def longest(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """The rows with the most tokens: padded to one length, they make the largest batch that can come."""
    return sorted(rows, key=lambda row: -len(row.input_ids))[:count]


def _try_step(trainer: Trainer, rows: list[TokenRow]) -> None:
    """Forward and backward through the Trainer's own step, with what is held at the same time in a real one."""
    samples, items = trainer.get_batch_samples(
        iter([trainer.data_collator([inputs_of(row) for row in rows])]), 1, trainer.args.device
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    if trainer.args.gradient_accumulation_steps > 1:
        for parameter in _trained(trainer):  # the gradients of the micro-batches before this one
            parameter.grad = torch.zeros_like(parameter)
    trainer.training_step(trainer.model, samples[0], items)


def _bytes_to_come(trainer: Trainer) -> int:
    """What the steps will hold and the probe does not: the optimizer's state, unless it came from a checkpoint."""
    room = PROCESSOR_ROOM_BYTES if trainer.args.device.type == "cpu" else 0
    if trainer.optimizer.state:
        return room
    return room + sum(state_bytes(trainer.args.optim.value, p.numel()) for p in _trained(trainer))


@contextlib.contextmanager
def _held(size: int, device: torch.device) -> Iterator[None]:
    """Hold so much memory. Raises DoesNotFit."""
    try:
        block = torch.empty(size, dtype=torch.uint8, device=device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(in_a_sentence(error)) from None
    yield
    del block


def _trained(trainer: Trainer) -> list[Any]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
