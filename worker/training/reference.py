"""Reference scores of pairs: from the base model, or from the adapter that the job starts from."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from loractl.common.job.sections import DataFormat
from loractl.worker.base.arithmetic import evaluating, random_streams_kept, whole_modules
from loractl.worker.base.batches import Computer
from loractl.worker.base.learner import Learner
from loractl.worker.data.forms import form_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.pairs import Pairs, Sizes
from loractl.worker.evaluation.losses import RowScores, score_rows

Known = dict[bytes, tuple[float, float]]
"""Summed log-probabilities of a pair's answers, chosen and rejected, by what the row is."""


class FrozenReference:
    """The base is resident: with its adapter switched off, or with the weights that the adapter began with.

    A row is scored once, before it is first learned from; trainings of one process that have the same base and rows
    share what is known.
    """

    def __init__(self, learner: Learner, known: Known, begun: Sequence[torch.Tensor] | None = None) -> None:
        """`begun`: the adapter's first weights, in the order of the trained parameters; None: it is switched off."""
        self._learner, self._known, self._begun = learner, known, begun

    def meet(self, rows: Sequence[TokenRow]) -> None:
        new = {key: row for row in rows if (key := _key(row)) not in self._known}
        if not new:
            return
        learner, form = self._learner, form_of(DataFormat.PREFERENCE)
        texts = [form.texts(row) for row in new.values()]
        # padding rounds otherwise with other pairs beside: what is known would depend on who met a pair first
        groups = texts if learner.scorer is None else [tuple(itertools.chain(*texts))]
        sums = list[float]()
        with random_streams_kept(), self._as_it_was(), whole_modules(learner.model, learner.precision.base):
            for group in groups:
                sums += (-self._scored(list(group)).loss).tolist()
        self._known.update(dict(zip(new, zip(sums[::2], sums[1::2], strict=True), strict=True)))

    def _scored(self, texts: list[TokenRow]) -> RowScores:
        model, tokenizer, scorer = self._learner.model, self._learner.tokenizer, self._learner.scorer
        return score_rows(model, tokenizer, texts, len(texts), scorer=scorer, run=lambda piece: piece())

    def of(self, row: TokenRow) -> tuple[float, float]:
        return self._known[_key(row)]

    @property
    def is_base(self) -> bool:
        return self._begun is None

    def pairs(self, rows: Sequence[TokenRow], batch: int, asked: Computer) -> Pairs:
        """Scores of all rows, in float64. `batch`: rows scored at a time."""
        for at in range(0, len(rows), batch):
            asked.run(partial(self.meet, rows[at : at + batch]))
        sums, sizes = [self.of(row) for row in rows], [Sizes.of(row) for row in rows]
        found = {
            "chosen": [chosen for chosen, _ in sums],
            "rejected": [rejected for _, rejected in sums],
            "chosen_tokens": [size.chosen for size in sizes],
            "rejected_tokens": [size.rejected for size in sizes],
        }
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
        return Pairs(**tensors, learned=tensors["chosen"], learned_tokens=tensors["chosen_tokens"])

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        model = self._learner.model
        with evaluating(model, base=self._begun is None), _with_weights(model, self._begun):
            yield


@contextlib.contextmanager
def _with_weights(model: Any, weights: Sequence[torch.Tensor] | None) -> Iterator[None]:
    """The trained parameters hold these meanwhile."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    now = [parameter.data for parameter in trained]
    try:
        for parameter, weight in zip(trained, weights or now, strict=True):
            parameter.data = weight
        yield
    finally:
        for parameter, weight in zip(trained, now, strict=True):
            parameter.data = weight


def _key(row: TokenRow) -> bytes:
    """What a row is: another one with the same number has other tokens."""
    said = array("l", (*row.input_ids, -1, *row.starts, -1, *row.labels)).tobytes()
    return hashlib.blake2b(said, digest_size=16).digest()
