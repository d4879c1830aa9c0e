"""One rank's part of a piece of work: which rows are its own, and their losses and gradients. The leader's pass lets
all ranks do theirs. A follower obeys until the leader ends, and knows no job and no order of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch

from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import evaluating
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import in_a_sentence, is_out_of_memory, release
from loractl.worker.base.model import ScoredTokens
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import Backward, ForwardPass, MicroBatch
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.engine.saved_state import read_streams

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
        if batch.learned:
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._link.sum_up([parameter.grad for parameter in self._trained])
        self._link.sum_up([self._window])
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
                torch.manual_seed(order["noise"] + self._link.rank)
                with self._in_step():
                    micro_batch = MicroBatch(rows=rows, **batch)
                    self._part.learn(micro_batch, lambda loss: torch.autograd.backward(loss * self._scale))
            case "score":
                rows = self._taken(self._own, order["rows"], order["known"])
                if order["spread"]:
                    self._part.take_weights()
                with evaluating(self._model), self._in_step():
                    self._part.held_out_loss(rows)
            case other:
                raise ValueError(f"the leader orders {other!r}, which no follower knows")

    def _taken(self, own: OwnPass, told: list[dict[str, Any]], known: list[Any]) -> list[TokenRow]:
        """The rows of an order; the loss gets what the leader's knows about them."""
        rows = [TokenRow(**row) for row in told]
        own.loss.take(rows, known)
        return rows

    def _in_step(self) -> contextlib.AbstractContextManager[Any]:
        """For work that all ranks do at once."""
        return contextlib.nullcontext() if self._shards is None else self._shards.together()


class DividedPass(ForwardPass):
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
        self.link.order("recompute", every=every)
        self.own.recompute_blocks(every)

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients; with a window's last one, those of the whole window. Returns the loss
        likewise."""
        if batch.number == 0:
            self.link.order("window", scale=self._scale(backward))
            self._part.begin_window()
        self._spread = batch.number < batch.pieces - 1  # a step follows the last one
        known = self.loss.known(batch.rows)
        # the seed of the others' dropout follows from the leader's stream without moving it: a resume drops the same
        streams: dict[str, Any] = read_streams(self.device)
        state = streams.get("cuda", streams["torch"]).numpy().tobytes()
        noise = int.from_bytes(hashlib.sha256(state).digest()[:6], "big")
        self.link.order("learn", noise=noise, batch=asdict(batch), known=known)
        return self._together(lambda: self._part.learn(batch, backward))

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        told = [asdict(row) for row in rows]
        self.link.order("score", rows=told, known=self.loss.known(rows), spread=not self._spread)
        if not self._spread:
            self._part.take_weights()
            self._spread = True
        return self._together(lambda: self._part.held_out_loss(rows))

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        return self.own.tokens(rows)

    def scores(self, rows: Sequence[TokenRow]) -> list[ScoredTokens]:
        """Every learned token of some rows, by the leader alone. Only if its pass is lean."""
        assert isinstance(self.own, LeanPass)
        return self.own.scores(rows)

    def end(self) -> None:
        """Let the others end."""
        self.link.order("end")
        self.link.close()

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
