"""A follower: does its part of the leader's orders until the leader ends. It knows no job and no order of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from loractl.worker.base.arithmetic import evaluating
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import BentLoss, MicroBatch

from .link import Link
from .part import OwnPass, Part, RankFull
from .shards import Shards


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
