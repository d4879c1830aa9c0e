"""The base's results, kept on the box: a later job with the same base and rows measures only a few of them again."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from loractl.worker.base.box_cache import BoxCache
from loractl.worker.data.tokens import TokenRow

from .row_losses import RowScores, by_example, longest_first

SCORES = ("rows", "rejected", "given", "whole", "alone", "regression", "shots")

NEAR_FP32, NEAR_16_BIT = 1e-4, 0.01
"""Nats for each token by which a row's loss may differ on a card, whose sums need not repeat; never run on a card."""


def slack(precision: torch.dtype) -> float:
    """By how much the loss of a token may differ on a card, in nats."""
    return NEAR_FP32 if precision is torch.float32 else NEAR_16_BIT


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """One model's results."""

    rows: RowScores
    rejected: RowScores
    given: RowScores
    whole: RowScores
    alone: RowScores
    regression: RowScores
    shots: RowScores  # of the base, with examples in its prompt
    texts: list[tuple[str, bool]]
    labels: list[tuple[str, bool]]
    shot_texts: list[tuple[str, bool]]
    halved: bool = False  # some of it in smaller batches than requested, since memory ran out; they round differently

    def by_example(
        self, rows: Sequence[TokenRow], regression: Sequence[TokenRow], shots: Sequence[TokenRow]
    ) -> MeasuredModel:
        """The sums of each example's rows."""
        return replace(
            self,
            rows=by_example(self.rows, rows),
            regression=by_example(self.regression, regression),
            shots=by_example(self.shots, shots) if len(self.shots.loss) else self.shots,
        )

    def as_json(self) -> bytes:
        scores = {name: {kind: found.tolist() for kind, found in vars(getattr(self, name)).items()} for name in SCORES}
        return json.dumps(
            {**scores, "texts": self.texts, "labels": self.labels, "shot_texts": self.shot_texts}
        ).encode()

    @classmethod
    def from_json(cls, content: bytes) -> MeasuredModel:
        told = json.loads(content)
        read: dict[str, Any] = {
            name: RowScores(**{kind: np.array(values, float) for kind, values in told[name].items()}) for name in SCORES
        }
        read |= {name: [(text, ended) for text, ended in told[name]] for name in ("texts", "labels", "shot_texts")}
        return cls(**read)


@dataclass(frozen=True, kw_only=True)
class EarlierMeasurement:
    """The job that measured the base on this box, and when."""

    job_id: int
    at: dt.datetime
    checked: int  # rows that were measured again, with equal losses


@dataclass(frozen=True, kw_only=True)
class BaseMeasurements:
    """What jobs of this box have measured of their bases."""

    cache: BoxCache
    turn: int  # another number has another batch measured again
    repeats: bool  # the device gives the same bits for the same rows: processors do
    precision: torch.dtype

    def find(
        self,
        question: str,
        rows: Sequence[TokenRow],
        batch: int,
        measure: Callable[[], MeasuredModel],
        score: Callable[[list[TokenRow]], RowScores],
    ) -> tuple[MeasuredModel, EarlierMeasurement | None]:
        """The base's results: an earlier job's, if a batch of `rows` still has the same losses; else what `measure`
        returns.

        `question`: a hash of all that is measured. `score` scores some rows with the base.
        """
        key = self.cache.key(question)
        if rows and (found := self.cache.read(key)) is not None:  # nothing is believed that can't be measured again
            earlier = MeasuredModel.from_json(found.content)
            order = longest_first(rows)
            first = batch * (self.turn % max(1, -(-len(order) // batch)))
            chosen = order[first : first + batch]
            if self._equal(earlier.rows, chosen, score([rows[place] for place in chosen])):
                file = found.file
                return earlier, EarlierMeasurement(job_id=file.job_id, at=file.at, checked=len(chosen))
            self.cache.drop(found.path, f"the base's losses of {len(chosen)} of its rows are other ones now")
        measured = measure()
        if not measured.halved:
            self.cache.write(key, measured.as_json())
        return measured, None

    def _equal(self, then: RowScores, chosen: list[int], now: RowScores) -> bool:
        """Whether some rows have the same scores. On a card, losses and guesses need only be near."""
        if self.repeats:
            return all(np.array_equal(getattr(then, name)[chosen], found) for name, found in vars(now).items())
        near = slack(self.precision)
        same = np.array_equal(then.tokens[chosen], now.tokens) and np.array_equal(then.stops[chosen], now.stops)
        return bool(same and (np.abs(then.loss[chosen] - now.loss) <= near * now.tokens).all())
