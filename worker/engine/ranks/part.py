"""One rank's part of a piece of work: which rows are its own, and their losses and gradients. A follower does its part
of the leader's orders until the leader ends, and knows no job and no order of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from loractl.worker.base.arithmetic import evaluating
from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory, release
from loractl.worker.data.tokens import TokenRow

from ..loss import Backward, BentLoss, MicroBatch
from ..passes.lean import LeanPass
from ..passes.padded import PaddedPass
from .link import Link
from .shards import Shards

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
            return self._own.learn(replace(batch, rows=rows, divided=True), backward)
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


class Follower:
    """One rank but the leader's."""

    def __init__(
        self, model: Any, link: Link, shards: Shards | None, make_pass: Callable[[bool, float | None], OwnPass]
    ) -> None:
        """`make_pass`: makes the adapted model's forward pass, lean or not, with NEFTune's noise."""
        self._model, self._link, self._shards, self._make_pass = model, link, shards, make_pass
        self._own: OwnPass | None = None
        self._part: Part | None = None
        self._scale = 1.0

    def follow(self, run: Callable[[Callable[[], None]], None]) -> None:
        """Obey until the leader ends. `run` does all computation. An error here comes through, and ends the whole
        training."""
        while True:
            with contextlib.suppress(RankFull):  # the leader decides what follows
                run(self._follow)
                return

    def _follow(self) -> None:
        self._model.train()
        for order in self._link.orders():
            if order["kind"] == "end":
                break
            if order["kind"] == "pass":
                self._own = self._make_pass(order["lean"], order["noise"])
                self._part = Part(self._own, self._link, lockstep=self._shards is not None)
            else:
                self._obey(order)
        self._link.close()

    def _obey(self, order: dict[str, Any]) -> None:
        if order["kind"] == "gather":
            assert self._shards is not None
            self._shards.gather(order["unit"])
            return
        assert self._own is not None and self._part is not None
        match order["kind"]:
            case "recompute":
                self._own.recompute_blocks(order["every"])
            case "window":
                self._scale = order["scale"]
                self._part.begin_window()
            case "learn":
                batch = order["batch"]
                rows = self._taken(self._own, batch.pop("rows"), order["known"])
                self._learn(self._part, order["noise"], MicroBatch(rows=rows, **batch))
            case "score":
                rows = self._taken(self._own, order["rows"], order["known"])
                self._score(self._part, rows, spread=order["spread"])
            case other:
                raise ValueError(f"the leader orders {other!r}, which no follower knows")

    def _taken(self, own: OwnPass, told: list[dict[str, Any]], known: list[Any]) -> list[TokenRow]:
        """The rows of an order; the loss gets what the leader's knows about them."""
        rows = [TokenRow(**row) for row in told]
        if isinstance(own.loss, BentLoss):
            own.loss.take(rows, known)
        return rows

    def _learn(self, part: Part, noise: int, batch: MicroBatch) -> None:
        torch.manual_seed(noise + self._link.rank)
        with self._in_step():
            part.learn(batch, lambda loss: torch.autograd.backward(loss * self._scale))

    def _score(self, part: Part, rows: list[TokenRow], *, spread: bool) -> None:
        if spread:
            part.take_weights()
        with evaluating(self._model), self._in_step():
            part.held_out_loss(rows)

    def _in_step(self) -> contextlib.AbstractContextManager[Any]:
        """For work that all ranks do at once."""
        return contextlib.nullcontext() if self._shards is None else self._shards.together()
