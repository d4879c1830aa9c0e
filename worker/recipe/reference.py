"""How the model that preferences must stay near scores pairs: once for each pair, and on a box once for all jobs with
the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loractl.common.job.sections import DataFormat
from loractl.worker.base.arithmetic import random_streams_kept
from loractl.worker.base.box_cache import BoxCache
from loractl.worker.base.model import Learner, measuring
from loractl.worker.data.row_forms import form_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.pairs import PairReference, Scores, row_key
from loractl.worker.evaluation.row_losses import score_rows

_FORM = np.dtype([("key", "V16"), ("scores", "<f8", 2)])
"""Of a pair in a file."""


@dataclass(frozen=True, kw_only=True)
class KeptScores:
    """Scores that jobs of this box leave for later ones.

    `cache` waits for the hashes of the base's files. `may_be_left`: False if these were
    never known on this box.
    `slack`: by how much a token's score may differ, as it may on a card.
    """

    cache: Callable[[], BoxCache]
    may_be_left: Callable[[], bool]
    question: Callable[[], object]
    slack: float

    def like(self, now: Scores, rows: Sequence[TokenRow]) -> Scores:
        """An earlier job's, if those of `rows`, which were scored just now, are among them and equal; else none."""
        if not self.may_be_left():
            return {}
        cache = self.cache()
        if (found := cache.read(cache.key(self.question()))) is None:
            return {}
        told = np.frombuffer(found.content, _FORM)
        scores = map(tuple, told["scores"].tolist())
        earlier: Scores = dict(zip(map(bytes, told["key"]), scores, strict=True))
        checked = [row for row in rows if row_key(row) in earlier]
        if not all(self._equal(now[row_key(row)], earlier[row_key(row)], row) for row in checked):
            cache.drop(found.path, f"the base's scores of {len(checked)} of its pairs are other ones now")
            return {}
        if not checked:
            return {}
        told_by = f"job {found.file.job_id} has scored {len(earlier)} pairs with the base on this box"
        cache.note(f"{told_by}; {len(checked)} of them were scored again and are equal")
        return earlier

    def _equal(self, now: tuple[float, float], then: tuple[float, float], row: TokenRow) -> bool:
        return all(abs(a - b) <= self.slack * len(row.input_ids) for a, b in zip(now, then, strict=True))

    def leave(self, known: Scores) -> None:
        cache = self.cache()
        cache.write(cache.key(self.question()), np.array(sorted(known.items()), _FORM).tobytes())


class FrozenReference(PairReference):
    """What a report calls base: the bare base, or the adapter with its first weights.

    A row is scored once, just before it is first learned from. `kept`: None: no other job's scores are used.
    """

    def __init__(self, learner: Learner, kept: KeptScores | None = None) -> None:
        super().__init__({})
        self._learner, self._kept = learner, kept
        self._earlier: int | None = None  # pairs that an earlier job has scored; None: not looked yet

    def meet(self, rows: Sequence[TokenRow]) -> None:
        new = {key: row for row in rows if (key := row_key(row)) not in self.known}
        if not new:
            return
        texts = [form_of(DataFormat.PREFERENCE).texts(row) for row in new.values()]
        # padded texts round differently in another batch, so there each pair is scored alone
        groups = texts if self._learner.scorer is None else [tuple(itertools.chain(*texts))]
        sums = list[float]()
        with random_streams_kept():
            measuring(self._learner, lambda: sums.extend(itertools.chain(*map(self._scored, groups))), base=True)
        self.known.update(dict(zip(new, zip(sums[::2], sums[1::2], strict=True), strict=True)))
        if self._kept is not None and self._earlier is None:
            earlier = self._kept.like(self.known, [*new.values()])
            self.known, self._earlier = earlier | self.known, len(earlier)

    def forget(self) -> None:
        """Score all pairs again, since they come in other micro-batches from now on."""
        self.known, self._earlier = {}, None

    def _scored(self, texts: Sequence[TokenRow]) -> list[float]:
        model, tokenizer, scorer = self._learner.model, self._learner.tokenizer, self._learner.scorer
        scores = score_rows(model, tokenizer, [*texts], len(texts), scorer=scorer, run=lambda piece: piece())
        summed: list[float] = (-scores.loss).tolist()
        return summed

    def leave(self) -> None:
        """Leave the scores to later jobs, once the training is over."""
        if self._kept is not None and len(self.known) > (self._earlier or 0):
            self._kept.leave(self.known)
