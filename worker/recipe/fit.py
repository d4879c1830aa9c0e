"""The training itself, restarted with smaller batches if the first do not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from loractl.common.job.adjustment import next_adjustment
from loractl.common.job.status import Reason, Stage
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import release
from loractl.worker.base.learner import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.row_forms import with_prompts
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.engine import ForwardPass
from loractl.worker.engine.loop import MemberRows, TrainingLoop
from loractl.worker.engine.passes.shared import SharedPass
from loractl.worker.engine.saved_state import read_snapshot
from loractl.worker.evaluation.stretches import Stretch
from loractl.worker.protocol.messages import Opened

from .arguments import training_arguments
from .best import BestKeeper
from .checkpoint import Checkpoint
from .probe import DoesNotFit, longest, try_longest
from .progress import Teller
from .recorder import Recorder
from .resume import CheckpointCloser, ResumeCheck, ResumeProof, begun_with, belongs_to, readable
from .run import Run, Stopped


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
        work, final = (_stretches(some, run, learner) for some in (data, data.of_final))
        proof, recorder = ResumeProof.of(learner, data), Recorder(data.train.tokens)
        best = BestKeeper(run, recorder)
        teller = Teller(run, recorder, work, final)
        closer = CheckpointCloser(run, belongs_to(run.order, data), proof, best)
        # the check and the brake come first: the others must not see a wrong model or a NaN loss
        order = (ResumeCheck(proof, checkpoint), Brake(run), recorder, best, closer, teller)
        return cls(checkpoint=checkpoint, proof=proof, recorder=recorder, best=best, teller=teller, in_order=order)


def _stretches(data: PreparedData | None, run: Run, learner: Learner) -> list[Stretch]:
    """The work of an evaluation."""
    return [] if data is None else run.kind.stretches(run.spec, data, learner.tokenizer)


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
        self._obey(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._obey(control)

    def _obey(self, control: Any) -> None:
        if self._run.stop.is_set():
            control.should_training_stop = True
            control.should_save = self._run.save_on_stop.is_set()


class BaseOpening(TrainerCallback):
    """Reports that others may train on the base, once the longest batches have fitted."""

    def __init__(self, run: Run, forward: ForwardPass) -> None:
        self._run, self._shares = run, isinstance(forward, SharedPass)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        order, size = self._run.order, self._run.base_cache.size
        if self._shares and size and not order.joins:
            self._run.tell(Opened(job_id=order.job_id, base_bytes=size))


def fit(
    run: Run, learner: Learner, forward: ForwardPass, data: PreparedData, callbacks: Callbacks
) -> TrainingArguments:
    """Train the model's adapter; batches that do not fit are made smaller before the first step.

    Returns the arguments with which it was trained. Raises TrainingFailed, Stopped, and out-of-memory in mid-training
    unchanged: the supervisor then starts a new process, with unfragmented memory, from the last checkpoint.
    """
    checkpoint = callbacks.checkpoint
    optimizer = begun_with(run.order, checkpoint)
    if checkpoint is not None and checkpoint.finished:
        run.session.run(partial(_take_finished, run, learner, callbacks, checkpoint))
        return training_arguments(run.order, run.spec, learner.precision, optimizer)
    while True:
        arguments = run.session.run(partial(training_arguments, run.order, run.spec, learner.precision, optimizer))
        failure = _fit_once(run, learner, forward, data, arguments, callbacks)
        run.session.run(release)  # of what did not fit, or of optimizer and gradients, which are no longer needed
        if failure is None:
            return arguments
        lighter = next_adjustment(run.order.spec, run.adjustment, on_gpu=run.on_gpu, cards=run.cards)
        if lighter is None:
            tokens = len(longest(data.trained_rows, 1)[0].input_ids)
            what = f"one row of {tokens} tokens does not fit, even with gradient checkpointing"
            raise TrainingFailed(Reason.OUT_OF_MEMORY, f"{what}: {failure}")
        run.adjust(lighter)


def _take_finished(run: Run, learner: Learner, callbacks: Callbacks, checkpoint: Checkpoint) -> None:
    """Load adapter and course from the checkpoint of the last step."""
    run.stage(Stage.TRAINING)
    with readable(checkpoint):
        progress = read_snapshot(learner.model, checkpoint.path)["progress"]
        callbacks.recorder.read_finished(progress)
        callbacks.best.read_finished(checkpoint.path, progress)
    callbacks.proof.check(learner.model, checkpoint)
    callbacks.teller.tell()


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
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(
            Path(run.order.output_dir) / "tensorboard"
        )  # stored with the result
    # the rows that the report measures: the losses of both are compared
    held_out: Sequence[TokenRow] = data.held_out.rows.first(run.spec.evaluation.max_rows)
    if run.spec.preference.learns_prompts:
        held_out = with_prompts(held_out)
    rows = MemberRows(train=data.trained_rows, held_out=held_out)
    # Without a limit no allocation fails on a CPU: the kernel kills a process, and a probe would notice nothing.
    probed = run.on_gpu or run.order.memory_limit is not None
    called = (*callbacks.in_order, BaseOpening(run, forward))
    loop = TrainingLoop(run.session, forward, arguments, rows, called, pages=run.order.keep is None)
    if callbacks.checkpoint is not None:
        with readable(callbacks.checkpoint):
            loop.resume(callbacks.checkpoint.path)
            callbacks.recorder.take_losses(loop.state.log_history)
            callbacks.best.bring(callbacks.checkpoint.path)
    try:
        if probed:
            try_longest(loop, learner, data, run)
        loop.run()
    except DoesNotFit as failure:
        return str(failure)
    finally:
        run.remains.note(loop.tensors)
    if run.stop.is_set() and loop.state.global_step < loop.state.max_steps and callbacks.best.stopped_early is None:
        raise Stopped
    return None
