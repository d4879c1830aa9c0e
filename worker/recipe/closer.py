"""Closes each checkpoint that the engine writes, so that a later attempt may go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loractl.worker.protocol.marker import close_checkpoint
from loractl.worker.protocol.messages import Saved

from .best import BestKeeper
from .resume import ResumeProof
from .run import Run


class CheckpointCloser(TrainerCallback):
    """Adds to a checkpoint what the engine does not know, writes the marker, and tells the supervisor."""

    def __init__(self, run: Run, belongs_to: dict[str, str], proof: ResumeProof, best: BestKeeper) -> None:
        self._run = run
        self._belongs_to = belongs_to
        self._proof = proof
        self._best = best

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        finished = state.global_step >= state.max_steps or self._best.stopped_early is not None
        self._best.store(folder)
        proof, step = self._proof.loss(model), state.global_step
        kind = args.optim.value
        self._run.require_base()
        close_checkpoint(folder, step=step, finished=finished, belongs_to=self._belongs_to, proof=proof, optimizer=kind)
        self._run.note("saved", f"saved step {step}")
        self._run.tell(Saved(job_id=self._run.order.job_id, step=step, path=str(folder)))
