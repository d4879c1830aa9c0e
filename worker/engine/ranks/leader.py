"""The leader's pass: all ranks do the work of one training, each with its rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from loractl.common.job.status import Reason
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory
from loractl.worker.base.model import ScoredTokens
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import Backward, BentLoss, MicroBatch
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.streams import read_streams

from .link import Link
from .part import OwnPass, Part, RankFull
from .shards import Shards

Answer = TypeVar("Answer")


class DividedPass:
    """A forward pass over several ranks. Only the leader has it: the others know neither the row order nor the
    optimizer."""

    def __init__(
        self,
        own: OwnPass,
        link: Link,
        shards: Shards | None = None,
        *,
        scales: bool = False,
        noise: float | None = None,
    ) -> None:
        """`scales`: whether losses are scaled for float16. `noise`: NEFTune's alpha."""
        self.own, self.link, self._shards = own, link, shards
        self.model, self.device, self.loss = own.model, own.device, own.loss
        self.ranks = link.size
        self._scales = scales
        link.order("pass", lean=isinstance(own, LeanPass), noise=noise)
        self._part = Part(own, link, lockstep=shards is not None)
        self._spread = False  # whether all ranks have the leader's weights

    def recompute_blocks(self, every: int = 1) -> None:
        """Hold the activations of each block (1), or of every second one (2), only in the backward pass."""
        self.link.order("recompute", every=every)
        self.own.recompute_blocks(every)

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients; with a window's last one, those of the whole window. Returns the loss
        likewise."""
        if batch.number == 0:
            self.link.order("window", scale=self._scale(backward))
            self._part.begin_window()
        self._spread = batch.number < batch.pieces - 1  # a step follows the last one
        known = self._known(batch.rows)
        self.link.order("learn", noise=self._noise(), batch=dataclasses.asdict(batch), known=known)
        return self._together(lambda: self._part.learn(batch, backward))

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        """The loss of one batch of held-out rows, not smoothed and summed over what it counts, for a model in eval
        mode."""
        told = [dataclasses.asdict(row) for row in rows]
        self.link.order("score", rows=told, known=self._known(rows), spread=not self._spread)
        if not self._spread:
            self._part.take_weights()
            self._spread = True
        return self._together(lambda: self._part.held_out_loss(rows))

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that pass the model."""
        return self.own.tokens(rows)

    def scores(self, rows: Sequence[TokenRow]) -> list[ScoredTokens]:
        """Every learned token of some rows, by the leader alone. Only if its pass is lean."""
        assert isinstance(self.own, LeanPass)
        return self.own.scores(rows)

    def end(self) -> None:
        """Let the others end."""
        self.link.order("end")
        self.link.close()

    def _known(self, rows: Sequence[TokenRow]) -> list[Any]:
        """What the others' losses can't find out themselves."""
        return self.loss.known(rows) if isinstance(self.loss, BentLoss) else []

    def _together(self, work: Callable[[], Answer]) -> Answer:
        """Work that all ranks do at once. Raises torch.OutOfMemoryError if a smaller batch may follow in this process,
        else TrainingFailed: the ranks of a divided base are out of step."""
        try:
            if self._shards is None:
                return work()
            with self._shards.together():
                return work()
        except RankFull as error:
            raise torch.OutOfMemoryError(str(error)) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingFailed(Reason.OUT_OF_MEMORY, f"a card of the job is full: {in_a_sentence(error)}") from None

    def _scale(self, backward: Backward) -> float:
        """The factor by which the backward pass multiplies a loss."""
        if not self._scales:
            return 1.0
        one = torch.ones((), device=self.device, requires_grad=True)
        backward(one)
        return float(one.grad) if one.grad is not None else 1.0

    def _noise(self) -> int:
        """The seed of the others' dropout: it follows from the leader's stream without moving it, so that a resume
        drops the same."""
        streams: dict[str, Any] = read_streams(self.device)
        state = streams.get("cuda", streams["torch"]).numpy().tobytes()
        return int.from_bytes(hashlib.sha256(state).digest()[:6], "big")
