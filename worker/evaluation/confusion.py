"""Answers that are labels: accuracy, macro F1 and the confusion of base and tuned.

The labels are those that the training rows teach. Any other answer counts as wrong, and as "other"; so does any answer
to a held-out row that expects some other text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .comparison import Array, Compared, compare_shares, draws, interval, percent

OTHER = "other"

MACRO_F1 = percent("macro_f1", "macro F1 of the labels")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What base and tuned answered when a label was expected; numbers are indices in `names`, OTHER's is the last."""

    names: list[str]
    expected: list[int]
    base: list[int]
    tuned: list[int]
    other: int | None = None  # OTHER's index, which is never right; None: a head answers only with labels

    @classmethod
    def of(cls, names: Sequence[str], expected: Sequence[str], base: Sequence[str], tuned: Sequence[str]) -> Labels:
        place = {_folded(name): n for n, name in enumerate(names)}

        def places(texts: Sequence[str]) -> list[int]:
            return [place.get(_folded(text), len(names)) for text in texts]

        said = {"expected": places(expected), "base": places(base), "tuned": places(tuned)}
        return cls(names=[*names, OTHER], other=len(names), **said)

    def right(self, answers: Sequence[int]) -> list[bool]:
        """For each row, whether the answer is its expected label."""
        return [answer == expected != self.other for answer, expected in zip(answers, self.expected, strict=True)]

    def confusion(self, answers: Sequence[int]) -> list[list[int]]:
        """Rows: the expected label; columns: the answered label."""
        counts = np.zeros((len(self.names), len(self.names)), dtype=int)
        np.add.at(counts, (np.array(self.expected), np.array(answers)), 1)
        return [[int(value) for value in row] for row in counts]

    def macro_f1(self) -> tuple[float, float, float, float]:
        """(base, tuned, low, high) in percent: the mean of each expected label's F1, 2 tp / (answered + expected), with
        the 95% interval of the change over paired bootstrap samples of the rows."""
        present = sorted(set(self.expected))
        rows = np.ones((1, len(self.expected)))
        base, tuned = (self._f1(answers, present, rows)[0] for answers in (self.base, self.tuned))
        sampled = draws(len(self.expected))
        changes = np.concatenate(
            [self._f1(self.tuned, present, some) - self._f1(self.base, present, some) for some in sampled]
        )
        low, high = interval(changes)
        return float(base), float(tuned), low, high

    def _f1(self, answers: Sequence[int], present: Sequence[int], rows: Array) -> Array:
        """Macro F1 in percent for each sample; `rows` says how often it contains each row (samples x rows)."""
        expected = np.array(self.expected)[:, None] == np.array(present)
        answered = np.array(answers)[:, None] == np.array(present)
        hit = expected & answered & np.array(self.right(answers))[:, None]
        right, there, said = rows @ hit, rows @ expected, rows @ answered
        with np.errstate(invalid="ignore"):
            f1 = np.where(there > 0, 2 * right / (there + said), np.nan)  # of the labels that a sample expects
        return 100 * np.nanmean(f1, axis=1)


def label_metrics(labels: Labels) -> list[Compared]:
    """Accuracy and macro F1."""
    return [
        compare_shares("accuracy", "labels right", labels.right(labels.base), labels.right(labels.tuned)),
        MACRO_F1.compared(len(labels.expected), *labels.macro_f1()),
    ]


def labels_taught(shares: Mapping[str, float] | None) -> list[str]:
    """The labels that training answers consist of, the most frequent first; empty if they are not labels.

    `shares`: of each answer, see label_shares.
    """
    return list(shares) if shares is not None and len(shares) > 1 else []


def _folded(text: str) -> str:
    return " ".join(text.split())
