"""Resuming from a checkpoint: each is closed with a proof, and the newest of this same training is used once the model
proves to be the saved one."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments

from loractl.common.job.identity import training_digests
from loractl.common.job.sections import TaskType
from loractl.common.job.status import Reason
from loractl.common.memory.weights import FUSED, PAGED, PLAIN, optimizer_name
from loractl.worker.base.arithmetic import evaluating, whole_modules
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.base.model import Learner
from loractl.worker.base.source import first_line
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.token_rows import collate, inputs_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.saved_state import FORMAT
from loractl.worker.protocol.exit_reason import names_card
from loractl.worker.protocol.marker import Checkpoint, close_checkpoint, newest_checkpoint, remove_marker
from loractl.worker.protocol.messages import Saved, Start

from .best import BestKeeper
from .run import Run

PROOF_ROWS = 2
PROOF_TOKENS = 256
"""The rows for a checkpoint's proof: enough to detect another base or a damaged adapter, cheap compared with a step."""

PROOF_TOLERANCE = 0.01
"""Share by which the resumed model's loss on the proof rows may differ: other cards and precisions round differently;
another base or a damaged adapter is far beyond."""


def checkpoint_to_resume(run: Run, data: PreparedData) -> Checkpoint | None:
    """The newest complete checkpoint of this same training, of this attempt or an earlier one.

    The job's history records it, and each that belongs to something else.
    """
    folders = [Path(run.order.checkpoint_dir), *map(Path, run.order.earlier_checkpoints)]
    others: list[int] = []

    def refused(step: int, differing: list[str]) -> None:
        others.append(step)
        why = f"{', '.join(differing)} differ"
        if "format" in differing:
            why = "another version of loractl wrote it, in another format; the training starts again"
        run.note("refused", f"the checkpoint of step {step} is not resumed: {why}")

    checkpoint = newest_checkpoint(folders, belongs_to(run.order, data), refused)
    if checkpoint is None and not others and any(True for folder in folders for _ in folder.glob("checkpoint-*")):
        run.note("restarted", "no whole checkpoint is left, so the training starts again from its first step")
    return checkpoint


def tell_resumed(
    run: Run, checkpoint: Checkpoint, args: TrainingArguments | None = None, *, lean: bool | None = None
) -> None:
    """Record from which checkpoint the training goes on, once that has proved to be whole. `args`: those with which it
    does; None: it is finished. `lean`: whether it does by the lean pass."""
    text = f"resumed from the checkpoint of step {checkpoint.step}"
    if (other := begun_with(run.order, checkpoint)) is not None:
        text += f", with the optimizer that it began with: {other}"
    if args is not None and checkpoint.dtype not in (None, now := _dtype(args)):
        scaler = " with a fresh loss scaler" if args.fp16 else ""
        text += f"; it was trained in {checkpoint.dtype} and continues in {now}{scaler}, as this device computes"
    if lean is not None and checkpoint.lean is not None and lean is not checkpoint.lean:
        text += f"; it was trained by {_PASSES[checkpoint.lean]} and continues by {_PASSES[lean]}"
    if args is not None and checkpoint.dtype is None and run.spec.task_type is TaskType.PREFERENCE:
        text += "; an earlier version began it, which computed some losses of pairs differently"
    run.note("resumed", text, resumed_from_step=checkpoint.step)


_PASSES = {True: "the lean pass", False: "peft's own pass, with padded rows"}


def begun_with(order: Start, checkpoint: Checkpoint | None) -> str | None:
    """The optimizer of a checkpoint from another kind of device, if the job names none: another optimizer could not use
    its state. None if this device would take the same."""
    here = optimizer_name(order.spec, order.method, on_gpu=order.device == "cuda")
    theirs = checkpoint.optimizer if checkpoint is not None else None
    return theirs if theirs in {PAGED, FUSED, PLAIN} - {here} and order.spec.training.optim == "auto" else None


def _dtype(args: TrainingArguments) -> str:
    """The number format of a training's products."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def belongs_to(order: Start, data: PreparedData) -> dict[str, str]:
    """What a checkpoint of this order belongs to, by name."""
    return {**training_digests(order.spec, order.method, data.digest), "format": FORMAT}


@dataclass(frozen=True, kw_only=True)
class ResumeProof:
    """A model's loss on a few rows. A checkpoint records it, and a resume from the checkpoint compares it."""

    rows: Sequence[TokenRow]
    pad: int
    compute: torch.dtype
    lean: bool  # whether the training goes by the lean pass

    @classmethod
    def of(cls, learner: Learner, data: PreparedData) -> ResumeProof:
        pad, compute = learner.tokenizer.pad_token_id, learner.precision.base
        lean = learner.scorer is not None
        return cls(rows=data.train.rows[:PROOF_ROWS], pad=pad, compute=compute, lean=lean)

    def loss(self, model: Any) -> float:
        """In eval mode: it draws no random numbers and changes nothing."""
        with whole_modules(model, self.compute):
            return proof_loss(model, self.rows, self.pad)

    def check(self, model: Any, checkpoint: Checkpoint) -> None:
        """Compare the model with its checkpoint's record. Raises TrainingFailed, with the checkpoint withdrawn."""
        if checkpoint.proof is None:
            return
        now = self.loss(model)
        if not abs(now - checkpoint.proof) <= PROOF_TOLERANCE * max(1.0, abs(checkpoint.proof)):
            raise withdrawn(
                checkpoint,
                f"does not resume: the loss on its proof rows is {now:.4f}, it recorded {checkpoint.proof:.4f}; is the "
                "base model another one on this box?",
            )


_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SafetensorError,
)  # fmt: skip
"""What damaged files raise when they are read, and when their contents are loaded."""


@contextlib.contextmanager
def readable(checkpoint: Checkpoint) -> Iterator[None]:
    """Withdraw a checkpoint whose files can't be read, or do not fit, though its marker calls it complete.

    Raises TrainingFailed.
    """
    try:
        yield
    except (TrainingFailed, *_UNREADABLE) as error:
        if is_out_of_memory(error) or names_card(str(error)):
            raise
        raise withdrawn(checkpoint, f"can't be read: {first_line(error)}") from error


def withdrawn(checkpoint: Checkpoint, why: str) -> TrainingFailed:
    """The failure over a checkpoint whose contents are not what it claims: from now on it counts as incomplete, and the
    supervisor withdraws it from the artifact store if it came from there."""
    remove_marker(checkpoint.path)
    what = f"the checkpoint of step {checkpoint.step} {why}"
    return TrainingFailed(Reason.TRAINER_ERROR, what, withdrawn=str(checkpoint.path))


class ResumeCheck(TrainerCallback):
    """Checks the model after its adapter was loaded from a checkpoint, before its first step."""

    def __init__(self, run: Run, proof: ResumeProof, checkpoint: Checkpoint | None) -> None:
        self._run = run
        self._proof = proof
        self._checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._checkpoint is not None:
            self._proof.check(model, self._checkpoint)
            tell_resumed(self._run, self._checkpoint, args, lean=self._proof.lean)


def proof_loss(model: Any, rows: Sequence[TokenRow], pad: int) -> float:
    """The mean loss of a model on a few rows, cut to PROOF_TOKENS, one at a time: on their tokens, or their labels."""
    losses = []
    with evaluating(model):
        for row in rows:
            kept = replace(row, input_ids=row.input_ids[:PROOF_TOKENS], labels=row.labels[:PROOF_TOKENS], starts=())
            batch = collate([inputs_of(kept)], pad)
            if row.label is None:
                batch["labels"] = batch["input_ids"].clone()  # every token: a cut row may have no learned token
            moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
            losses.append(float(model(**moved).loss))
    return statistics.fmean(losses)


class CheckpointCloser(TrainerCallback):
    """Adds to a checkpoint what the engine does not know, writes the marker, and notifies the supervisor."""

    def __init__(self, run: Run, belongs_to: dict[str, str], proof: ResumeProof, best: BestKeeper) -> None:
        self._run = run
        self._belongs_to = belongs_to
        self._proof = proof
        self._best = best

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        finished = self._best.is_over(state) and not control.should_evaluate  # a stop came before the last evaluation
        self._best.store(folder)
        proof, step = self._proof.loss(model), state.global_step
        close_checkpoint(
            folder,
            step=step,
            finished=finished,
            belongs_to=self._belongs_to,
            proof=proof,
            optimizer=args.optim.value,
            dtype=_dtype(args),
            lean=self._proof.lean,
        )
        self._run.note("saved", f"saved step {step}")
        self._run.tell(Saved(job_id=self._run.order.job_id, step=step, path=str(folder)))
