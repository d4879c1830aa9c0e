"""The training itself, restarted with smaller batches if the first do not fit.

A job's longest batches are tried before its first step: if they do not fit, that is known within a minute. A try leaves
no trace: weights, optimizer, gradients and random numbers are as before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from loractl.common.job.adjustment import in_words, next_adjustment
from loractl.common.job.status import Reason, Stage
from loractl.worker.base.arithmetic import evaluating, random_streams_kept
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import in_a_sentence, in_batches, in_own_thread, is_out_of_memory, release
from loractl.worker.base.model import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.row_forms import with_prompts
from loractl.worker.data.token_rows import lengths_in
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loop import TrainingLoop, TrainingRows
from loractl.worker.engine.loss import ForwardPass, window_of
from loractl.worker.engine.optimizer import state_sizes
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.saved_state import read_snapshot
from loractl.worker.protocol.marker import Checkpoint
from loractl.worker.protocol.messages import Again

from .arguments import name_project, training_arguments
from .best import BestKeeper
from .progress import Recorder, Teller
from .resume import CheckpointCloser, ResumeCheck, ResumeProof, begun_with, belongs_to, readable, tell_resumed
from .run import Run, Stopped

PROCESSOR_ROOM_BYTES = 256 * 2**20
"""Held during the probe on a CPU, in place of what libraries keep after some steps. Over 61 batches of other lengths
writable memory grew by 228 MiB, with tiles (AMX) by 271: kernels that oneDNN compiles for each, holes in the heap."""


class DoesNotFit(Exception):
    """A batch of the training ran out of memory before the run began."""


def try_longest(loop: TrainingLoop, learner: Learner, data: PreparedData, run: Run) -> None:
    """Try a training step on the longest rows, then the evaluation's longest batch.

    If the latter does not fit, it is made smaller, and the run gets the number of rows that fit. Raises DoesNotFit if
    the training does not fit, and the out-of-memory error itself if evaluating a single row does not.

    A try has its own thread: the thread that trains must not have met out-of-memory (`in_own_thread`).
    """
    held = list[torch.Tensor]()
    rows = largest_batch(data, run, loop)
    try:
        in_own_thread(partial(_try_step, loop, rows, held))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure: str | None = in_a_sentence(error)
    else:
        failure = None
    try:
        if failure is not None:
            raise DoesNotFit(failure)  # outside the handler: neither the error nor its context may hold tensors
        if isinstance(loop.forward, LeanPass) and (by_row := loop.forward.layout.by_row) is not None:
            # a card starts kernels for each row: a step of many short rows may take several times as long
            run.note("engine", f"attention goes row by row: {by_row}")
        _try_evaluation(loop, learner, data, run)
    finally:
        held.clear()


def largest_batch(data: PreparedData, run: Run, loop: TrainingLoop) -> list[TokenRow]:
    """The largest possible batch; with several cards, each has the longest rows."""
    rows, size = data.trained_rows, loop.args.per_device_train_batch_size // run.cards
    batches = [longest(rows, size)]
    if run.spec.kind.halves > 1:  # a padded pair is as long as its longer answer makes it
        batches.append(longest(rows, size, rows.texts))
    return max(batches, key=loop.forward.tokens) * run.cards


def _try_evaluation(loop: TrainingLoop, learner: Learner, data: PreparedData, run: Run) -> None:
    """A batch of the evaluation in mid-training, if there is one, and of the report's evaluation."""
    args = loop.args
    in_training, wanted = args.eval_strategy != "no", args.per_device_eval_batch_size
    batch = longest(data.held_out.rows.first(run.spec.evaluation.max_rows), wanted)

    def work(chosen: list[int]) -> None:
        picked = [batch[i] for i in chosen]
        if in_training:
            loop.forward.loss.meet(picked)
            loop.forward.held_out_loss(picked)
        run.kind.score(learner, picked)

    def tried(piece: Callable[[], None]) -> None:
        with random_streams_kept(), evaluating(learner.model):
            piece()

    fitting = in_batches(list(range(len(batch))), wanted, work, lambda piece: in_own_thread(partial(tried, piece)))
    if fitting != wanted:
        args.per_device_eval_batch_size = fitting
        run.adjust(replace(run.adjustment, eval_batch=fitting))


def longest(rows: Sequence[TokenRow], count: int, own: Sequence[int] | None = None) -> list[TokenRow]:
    """The rows with the most tokens: they make the largest possible batch. `own`: each row's tokens, if not all of
    them count."""
    lengths = lengths_in(rows) if own is None else own
    return [rows[place] for place in sorted(range(len(rows)), key=lambda place: -lengths[place])[:count]]


def _try_step(loop: TrainingLoop, rows: list[TokenRow], held: list[torch.Tensor]) -> None:
    """Forward and backward like a step's, with what a real step has `held` at the same time."""
    pieces, device = loop.args.gradient_accumulation_steps, loop.forward.device
    with random_streams_kept():
        loop.forward.loss.meet(rows)
        held.append(torch.empty(_bytes_to_come(loop), dtype=torch.uint8, device=device))
        try:
            if pieces > 1:
                for parameter in loop.trained:  # the gradients of earlier micro-batches
                    parameter.grad = torch.zeros_like(parameter)
            (batch,) = window_of(loop.forward.loss, [rows])
            loop.forward.learn(replace(batch, pieces=pieces), loop.optimizer.backward)
        finally:
            loop.model.zero_grad()


def _bytes_to_come(loop: TrainingLoop) -> int:
    """What the steps will hold but the probe does not: the optimizer's state, unless it came from a checkpoint."""
    room = PROCESSOR_ROOM_BYTES if loop.forward.device.type == "cpu" else 0
    if loop.optimizer.inner.state:
        return room
    return room + sum(state_sizes(loop.model, loop.args.optim.value))


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """The callbacks of a training, each with its own task."""

    checkpoint: Checkpoint | None  # from which the training resumes
    proof: ResumeProof
    recorder: Recorder
    best: BestKeeper
    teller: Teller
    in_order: tuple[TrainerCallback, ...]

    @classmethod
    def of(cls, run: Run, learner: Learner, data: PreparedData, checkpoint: Checkpoint | None) -> Callbacks:
        work, final = (
            [] if some is None else run.kind.stretches(run.spec, some, learner.tokenizer)
            for some in (data, data.of_final)
        )
        proof, recorder = ResumeProof.of(learner, data), Recorder(data.train.tokens)
        best = BestKeeper(run, recorder)
        teller = Teller(run, recorder, work, final)
        closer = CheckpointCloser(run, belongs_to(run.order, data), proof, best)
        # the check and the brake come first: the others must not see a wrong model or a NaN loss
        order = (ResumeCheck(run, proof, checkpoint), Brake(run), recorder, best, closer, teller)
        return cls(checkpoint=checkpoint, proof=proof, recorder=recorder, best=best, teller=teller, in_order=order)


SKIPS = 20
"""Steps in a row that the loss scaler may skip. It begins at 2^16 and halves: a scale still too large after this many
is below 1, so the gradients themselves overflow."""


class Brake(TrainerCallback):
    """Ends a training before its last step: if it diverges, or if the supervisor asks for it.

    In float16 a gradient that is not finite is no divergence: the loss scaler skips that step and lowers its scale.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._skipped = 0  # in a row
        self._said = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if not getattr(optimizer, "step_was_skipped", False):
            self._skipped = 0
            return
        self._skipped += 1
        if not self._said:
            self._said = True
            what = (
                f"float16: step {state.global_step + 1} changed nothing, the loss scale was too high for its gradients"
            )
            self._run.note("precision", f"{what}; it is halved until they fit")
        if self._skipped >= SKIPS:
            what = f"the gradients overflowed float16 in {SKIPS} steps in a row up to step {state.global_step + 1}"
            raise TrainingFailed(Reason.DIVERGED, f"{what}; training.dtype: float32 has the range")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "grad_norm", "eval_loss"):
            if logs and name in logs and not math.isfinite(logs[name]):
                raise TrainingFailed(Reason.DIVERGED, f"{name} became {logs[name]} at step {state.global_step}")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.go_on()  # a step of many micro-batches may take longer than a silence may last
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._run.stop.came.is_set():
            control.should_training_stop = True
            control.should_save = self._run.stop.saves.is_set()

    on_prediction_step = on_step_end


def fit(
    run: Run, learner: Learner, forward: ForwardPass, data: PreparedData, callbacks: Callbacks
) -> TrainingArguments:
    """Train the model's adapter; batches that do not fit are made smaller before the first step.

    Returns the arguments with which it was trained. Raises TrainingFailed, Stopped, and out-of-memory in mid-training
    once a checkpoint is left: the supervisor then starts a new process, with unfragmented memory, from the last one.
    """
    checkpoint = callbacks.checkpoint
    optimizer = begun_with(run.order, checkpoint)
    if checkpoint is not None and checkpoint.finished:
        _take_finished(run, learner, callbacks, checkpoint)
        return training_arguments(run.order, run.spec, learner.precision, optimizer)
    while True:
        arguments = training_arguments(run.order, run.spec, learner.precision, optimizer)
        failure = _fit_once(run, learner, forward, data, arguments, callbacks)
        release()  # of what did not fit, or of optimizer and gradients, which are no longer needed
        if failure is None:
            return arguments
        lighter = next_adjustment(run.order.spec, run.adjustment, on_gpu=run.on_gpu, cards=run.cards)
        if lighter is None:
            tokens = len(longest(data.trained_rows, 1)[0].input_ids)
            what = f"one row of {tokens} tokens does not fit, even with gradient checkpointing"
            raise TrainingFailed(Reason.OUT_OF_MEMORY, f"{what}: {failure}")
        run.adjust(lighter)
        forward.loss.forget()


def _take_finished(run: Run, learner: Learner, callbacks: Callbacks, checkpoint: Checkpoint) -> None:
    """Load adapter and course from the checkpoint of the last step."""
    run.stage(Stage.TRAINING)
    with readable(checkpoint):
        progress = read_snapshot(learner.model, checkpoint.path)["progress"]
        callbacks.recorder.read_finished(progress)
        callbacks.best.read_finished(checkpoint.path, progress)
    callbacks.proof.check(learner.model, checkpoint)
    tell_resumed(run, checkpoint)
    callbacks.teller.tell()


def _save_last_step(run: Run, loop: TrainingLoop) -> None:
    """Leave a checkpoint for the process that goes on with less. Without memory for that, the last one must do."""
    try:
        loop.save_last_step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        run.say(f"no checkpoint of the last step: {in_a_sentence(error)}")


def _with_less(run: Run, step: int) -> Again | None:
    """How another process goes on. None if no smaller batch helps."""
    order, before = run.order, run.adjustment
    if (lighter := next_adjustment(order.spec, before, on_gpu=run.on_gpu)) is None:
        return None
    change = in_words(order.spec, before, lighter, where=f"at step {step}", then="restarts")
    return Again(job_id=order.job_id, adjustment=lighter, change=change)


def _fit_once(
    run: Run,
    learner: Learner,
    forward: ForwardPass,
    data: PreparedData,
    arguments: TrainingArguments,
    callbacks: Callbacks,
) -> str | None:
    """Train to the end. Returns torch's message if the longest batch does not fit; then nothing was trained."""
    if run.spec.training.report_to:
        name_project(run.spec)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(
            Path(run.order.output_dir) / "tensorboard"
        )  # stored with the result
    # the rows that the report measures: the losses of both are compared
    held_out: Sequence[TokenRow] = data.held_out.rows.first(run.spec.evaluation.max_rows)
    if run.spec.preference.learns_prompts:
        held_out = with_prompts(held_out)
    rows = TrainingRows(train=data.trained_rows, held_out=held_out)
    # Without a limit no allocation fails on a CPU: the kernel kills a process, and a probe would notice nothing.
    probed = run.on_gpu or run.order.memory_limit is not None
    loop = TrainingLoop(forward, arguments, rows, callbacks.in_order)
    if callbacks.checkpoint is not None:
        with readable(callbacks.checkpoint):
            loop.resume(callbacks.checkpoint.path)
            callbacks.recorder.take_losses(loop.state.log_history)
            callbacks.best.bring(callbacks.checkpoint.path)
    try:
        if probed:
            try_longest(loop, learner, data, run)
    except DoesNotFit as failure:
        return str(failure)
    try:
        loop.run()
    except Exception as error:
        if is_out_of_memory(error) and not run.order.ranks:  # ranks may be out of step
            _save_last_step(run, loop)
            run.again = _with_less(run, loop.state.global_step)
        raise
    if run.stop.came.is_set() and (loop.evaluation_due or not callbacks.best.is_over(loop.state)):
        raise Stopped
    return None
