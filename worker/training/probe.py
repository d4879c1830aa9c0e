"""The longest batches of a job, tried before its first step: what does not fit is known within a minute.

The probe takes part in a training as a callback, when model, optimizer and autocast are as the steps will find them.
It leaves no trace: weights, optimizer, gradients and random numbers are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from loractl.common.memory.optimizer import state_bytes
from loractl.worker.base.arithmetic import evaluating, random_streams_kept
from loractl.worker.base.batches import in_batches
from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory
from loractl.worker.base.learner import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.token_rows import lengths_in
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import MicroBatch, learned_in
from loractl.worker.engine.member import ForwardPass, PackMember
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.evaluation.classifier import classify
from loractl.worker.evaluation.losses import score_rows

from .run import Run

PROCESSOR_ROOM_BYTES = 128 * 2**20
"""Held during the probe on a CPU, in place of what libraries keep after some steps: 60 to 140 MiB of compiled kernels
in oneDNN's cache were seen. A first step does not hold them yet."""


class DoesNotFit(Exception):
    """A batch of the training ran out of memory before the run began."""


class Probe(TrainerCallback):
    """Tries a training step on the longest rows, then the evaluation's longest batch.

    Where the latter does not fit it is made smaller, and the run is told the rows that fit. Raises DoesNotFit where the
    training does not fit, and out-of-memory as it is where evaluating a single row does not.
    """

    member: PackMember  # given once it is made, with this among its callbacks

    def __init__(self, learner: Learner, data: PreparedData, run: Run) -> None:
        self._learner = learner
        self._data = data
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        member, failure = self.member, None
        with random_streams_kept(), _held(_bytes_to_come(member), member.forward.device):
            try:
                _try_step(member, self._largest(args.per_device_train_batch_size))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = in_a_sentence(error)
            finally:
                member.model.zero_grad()
            if failure is None:
                self._tell_attention(member.forward)
                self._try_evaluation(args)
        if failure is not None:
            raise DoesNotFit(failure)  # outside of the handler: the error's traceback holds the batch's tensors

    def _tell_attention(self, forward: ForwardPass) -> None:
        """Say why a card starts kernels for each row: a step of many short rows may take several times as long so."""
        if isinstance(forward, LeanPass) and forward.by_row is not None:
            self._run.note("engine", f"attention goes row by row: {forward.by_row}")

    def _largest(self, size: int) -> list[TokenRow]:
        """The largest batch that can come; on several cards each of them has the longest rows."""
        cards = self._run.cards
        return longest(self._data.trained_rows, size // cards) * cards

    def _try_evaluation(self, args: Any) -> None:
        """A batch as it is evaluated in mid-training, where it is, and as the report's evaluation does it."""
        model, tokenizer = self._learner.model, self._learner.tokenizer
        in_training, wanted = args.eval_strategy != "no", args.per_device_eval_batch_size
        rows = self._data.held_out.rows.first(self._run.spec.evaluation.max_rows)
        batch = longest(rows, wanted)

        def work(chosen: list[int]) -> None:
            picked = [batch[i] for i in chosen]
            if in_training:
                self.member.forward.held_out_loss(picked)
            if self._data.label_names:
                classify(model, tokenizer.pad_token_id, picked, len(picked))
            else:
                score_rows(model, tokenizer, picked, len(picked), scorer=self._learner.scorer)

        with evaluating(model):
            fitting = in_batches(list(range(len(batch))), wanted, work)
        if fitting != wanted:
            args.per_device_eval_batch_size = fitting
            self._run.adjust_evaluation(fitting)


def longest(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """The rows with the most tokens: they make the largest batch that can come."""
    lengths = lengths_in(rows)
    return [rows[place] for place in sorted(range(len(rows)), key=lambda place: -lengths[place])[:count]]


def _try_step(member: PackMember, rows: list[TokenRow]) -> None:
    """Forward and backward as the steps do it, with what is held at the same time in a real one."""
    pieces = member.args.gradient_accumulation_steps
    if pieces > 1:
        for parameter in member.trained:  # the gradients of the micro-batches before this one
            parameter.grad = torch.zeros_like(parameter)
    batch = MicroBatch(rows=rows, learned=max(1, learned_in(rows)), pieces=pieces)
    member.forward.learn(batch, member.optimizer.backward)


def _bytes_to_come(member: PackMember) -> int:
    """What the steps will hold and the probe does not: the optimizer's state, unless it came from a checkpoint."""
    room = PROCESSOR_ROOM_BYTES if member.forward.device.type == "cpu" else 0
    if member.optimizer.inner.state:
        return room
    return room + sum(state_bytes(member.args.optim.value, parameter.numel()) for parameter in member.trained)


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
