"""One rank's part of a piece of work: which rows are its own, and their losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory, release
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import Backward, MicroBatch
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass

from .link import Link

Answer = TypeVar("Answer")
OwnPass = LeanPass | PaddedPass


def rows_of(rows: Sequence[TokenRow], rank: int, size: int) -> list[TokenRow]:
    """A rank's rows of a batch: as many as the others', or one fewer. The first rank has some if there are any."""
    begin, end = (-(-at * len(rows) // size) for at in (rank, rank + 1))
    return list(rows[begin:end])


class RankFull(MemoryError):
    """Some rank had no memory for its rows, and no rank has learned from them."""


class Part:
    """Computes one rank's part. `lockstep`: whether the base is divided, so that each pass through it needs all ranks
    at once."""

    def __init__(self, own: OwnPass, link: Link, *, lockstep: bool) -> None:
        self._own, self._link, self._lockstep = own, link, lockstep
        self._trained = [parameter for parameter in own.model.parameters() if parameter.requires_grad]
        self._window = torch.zeros((), device=own.device)  # the loss since the window began

    def begin_window(self) -> None:
        """Let all ranks continue from the leader's weights, without gradients."""
        for parameter in self._trained:
            parameter.grad = None
        self._window.zero_()
        self.take_weights()

    def take_weights(self) -> None:
        """Give all ranks the leader's weights."""
        self._link.spread([parameter.data for parameter in self._trained])

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave the gradients of this rank's rows, and with the window's last rows, in the leader, the sums over all
        ranks. Returns this rank's share of the loss; the leader's last one includes the others'."""
        loss = self._agreed(lambda: self._learn_own(batch, backward))
        self._window += loss
        if batch.number < batch.pieces - 1:
            return loss
        if self._link.rank == 0:
            self._window.copy_(loss)  # its earlier ones are counted
        self._sum_up(batch.learned)
        return self._window.clone()

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        """The summed loss of a batch in nats, in the leader, for a model in eval mode."""
        own = rows_of(rows, self._link.rank, self._link.size)

        def measure() -> float:
            if own:
                return self._own.held_out_loss(own)
            if self._lockstep:
                self._own.pass_through(rows[0])
            return 0.0

        found = torch.tensor(self._agreed(measure), dtype=torch.float64)
        self._link.sum_up([found])
        return float(found)

    def _learn_own(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        rows = rows_of(batch.rows, self._link.rank, self._link.size)
        if self._own.loss.count(rows):
            own = MicroBatch(rows=rows, learned=batch.learned, pieces=batch.pieces, divided=True)
            return self._own.learn(own, backward)
        if self._lockstep:
            self._own.pass_through(batch.rows[0], learns=True)
        return torch.zeros((), device=self._own.device)

    def _sum_up(self, learned: int) -> None:
        if learned:
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._link.sum_up([parameter.grad for parameter in self._trained])
        self._link.sum_up([self._window])

    def _agreed(self, work: Callable[[], Answer]) -> Answer:
        """The result of the work. Raises RankFull in all ranks if one is out of memory: a smaller batch may follow.

        The ranks of a divided base would be out of step: there the error itself ends its process, and so the training.
        """
        if self._lockstep:
            return work()
        failure = None
        try:
            found = work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = in_a_sentence(error)
        if self._link.any(failure is not None):
            release()  # outside the handler: the error's traceback holds the tensors
            raise RankFull(failure or "another card of the job had no room")
        return found
