"""Reference scores of pairs: from the base model, or from the adapter that the job starts from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from loractl.common.job.sections import DataFormat
from loractl.worker.base.arithmetic import random_streams_kept
from loractl.worker.base.learner import Learner
from loractl.worker.data.row_forms import form_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.pairs import Scores, row_key
from loractl.worker.evaluation.evaluation import measuring
from loractl.worker.evaluation.row_losses import score_rows


class FrozenReference:
    """What a report calls base: the bare base, or the adapter with its first weights.

    A row is scored once, just before it is first learned from. Trainings of one process with the same base share the
    scores.
    """

    def __init__(self, learner: Learner, known: Scores) -> None:
        self._learner, self._known = learner, known

    def meet(self, rows: Sequence[TokenRow]) -> None:
        new = {key: row for row in rows if (key := row_key(row)) not in self._known}
        if not new:
            return
        texts = [form_of(DataFormat.PREFERENCE).texts(row) for row in new.values()]
        # padded texts round differently in another batch, so there each pair is scored alone
        groups = texts if self._learner.scorer is None else [tuple(itertools.chain(*texts))]
        sums = list[float]()
        with random_streams_kept():
            measuring(self._learner, lambda: sums.extend(itertools.chain(*map(self._scored, groups))), base=True)
        self._known.update(dict(zip(new, zip(sums[::2], sums[1::2], strict=True), strict=True)))

    def _scored(self, texts: Sequence[TokenRow]) -> list[float]:
        model, tokenizer, scorer = self._learner.model, self._learner.tokenizer, self._learner.scorer
        scores = score_rows(model, tokenizer, [*texts], len(texts), scorer=scorer, run=lambda piece: piece())
        summed: list[float] = (-scores.loss).tolist()
        return summed

    def of(self, row: TokenRow) -> tuple[float, float]:
        return self._known[row_key(row)]
