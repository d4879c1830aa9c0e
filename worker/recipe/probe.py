"""Tries a job's longest batches before its first step: if they do not fit, that is known within a minute.

It leaves no trace: weights, optimizer, gradients and random numbers are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from loractl.common.memory.weights import state_bytes
from loractl.worker.base.arithmetic import evaluating, random_streams_kept
from loractl.worker.base.batches import in_batches
from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory
from loractl.worker.base.learner import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.token_rows import lengths_in
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.engine import ForwardPass
from loractl.worker.engine.loop import TrainingLoop
from loractl.worker.engine.loss import MicroBatch, meet
from loractl.worker.engine.passes.lean import LeanPass

from .run import Run

PROCESSOR_ROOM_BYTES = 128 * 2**20
"""Held during the probe on a CPU, in place of what libraries keep after some steps: 60 to 140 MiB of compiled kernels
were measured in oneDNN's cache. A first step does not hold them yet."""


class DoesNotFit(Exception):
    """A batch of the training ran out of memory before the run began."""


def try_longest(loop: TrainingLoop, learner: Learner, data: PreparedData, run: Run) -> None:
    """Try a training step on the longest rows, then the evaluation's longest batch.

    If the latter does not fit, it is made smaller, and the run gets the number of rows that fit. Raises DoesNotFit if
    the training does not fit, and the out-of-memory error itself if evaluating a single row does not.
    """
    ask, held = run.session.run, list[torch.Tensor]()
    rows = _largest(data, run, loop.args.per_device_train_batch_size)
    try:
        ask(partial(_try_step, loop, rows, held))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure: str | None = in_a_sentence(error)
    else:
        failure = None
    try:
        if failure is not None:
            raise DoesNotFit(failure)  # outside the handler: neither the error nor its context may hold tensors
        _tell_attention(loop.forward, run)
        _try_evaluation(loop, learner, data, run)
    finally:
        ask(held.clear)


def _tell_attention(forward: ForwardPass, run: Run) -> None:
    """Report why a card starts kernels for each row: that may make a step of many short rows several times as long."""
    if isinstance(forward, LeanPass) and forward.by_row is not None:
        run.note("engine", f"attention goes row by row: {forward.by_row}")


def _largest(data: PreparedData, run: Run, size: int) -> list[TokenRow]:
    """The largest possible batch; with several cards, each has the longest rows."""
    return longest(data.trained_rows, size // run.cards) * run.cards


def _try_evaluation(loop: TrainingLoop, learner: Learner, data: PreparedData, run: Run) -> None:
    """A batch of the evaluation in mid-training, if there is one, and of the report's evaluation."""
    args = loop.args
    in_training, wanted = args.eval_strategy != "no", args.per_device_eval_batch_size
    batch = longest(data.held_out.rows.first(run.spec.evaluation.max_rows), wanted)

    def work(chosen: list[int]) -> None:
        picked = [batch[i] for i in chosen]
        if in_training:
            meet(loop.forward.loss, picked)
            loop.forward.held_out_loss(picked)
        run.kind.score(learner, picked)

    def tried(piece: Callable[[], None]) -> None:
        with random_streams_kept(), evaluating(learner.model):
            piece()

    fitting = in_batches(list(range(len(batch))), wanted, work, lambda piece: run.session.run(partial(tried, piece)))
    if fitting != wanted:
        args.per_device_eval_batch_size = fitting
        run.adjust_evaluation(fitting)


def longest(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """The rows with the most tokens: they make the largest possible batch."""
    lengths = lengths_in(rows)
    return [rows[place] for place in sorted(range(len(rows)), key=lambda place: -lengths[place])[:count]]


def _try_step(loop: TrainingLoop, rows: list[TokenRow], held: list[torch.Tensor]) -> None:
    """Forward and backward like a step's, with what a real step has `held` at the same time."""
    pieces, device = loop.args.gradient_accumulation_steps, loop.forward.device
    with random_streams_kept():
        meet(loop.forward.loss, rows)
        held.append(torch.empty(_bytes_to_come(loop), dtype=torch.uint8, device=device))
        try:
            if pieces > 1:
                for parameter in loop.trained:  # the gradients of earlier micro-batches
                    parameter.grad = torch.zeros_like(parameter)
            batch = MicroBatch(rows=rows, learned=max(1, loop.forward.loss.count(rows)), pieces=pieces)
            loop.forward.learn(batch, loop.optimizer.backward)
        finally:
            loop.model.zero_grad()


def _bytes_to_come(loop: TrainingLoop) -> int:
    """What the steps will hold but the probe does not: the optimizer's state, unless it came from a checkpoint."""
    room = PROCESSOR_ROOM_BYTES if loop.forward.device.type == "cpu" else 0
    if loop.optimizer.inner.state:
        return room
    return room + sum(state_bytes(loop.args.optim.value, parameter.numel()) for parameter in loop.trained)
