"""What the labels' shares of the rows to train on are worth by themselves, without a look at any question.

A base that has never seen the labels is easy to beat: a model that always answers with the most frequent label, and
gives each its share as its probability, beats it as well. So the tuned model is compared with that, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loractl.common.data.examples import Example
from loractl.common.data.findings import answer_of

from .comparison import Compared, Measure, compare_shares
from .confusion import Labels
from .row_losses import RowScores

CHEAP_LOSS = Measure(name="cheap_loss", label="loss, against labels' shares")

UNSEEN = 1e-3
"""Probability of a label that no row to train on has: as if a thousand rows lacked it."""


def cheap_metrics(
    examples: Sequence[Example], shares: Mapping[str, float] | None, tuned: RowScores, labels: Labels | None
) -> list[Compared]:
    """The tuned model's loss and right answers against those of the shares. None if answers are no labels, or if an
    example has several.

    `examples`, `tuned`: row by row. `shares`: of each label, the most frequent first, see label_shares.
    """
    if shares is None or any(len(example.answers) > 1 for example in examples if example.turns):
        return []
    cheap = np.array([-np.log(shares.get(answer_of(example).strip(), UNSEEN)) for example in examples])
    metrics = [CHEAP_LOSS.compare(cheap, tuned.loss, tuned.tokens)]
    if labels is not None:
        most_frequent = labels.right([0] * len(labels.expected))
        right = labels.right(labels.tuned)
        metrics.append(
            compare_shares("cheap_accuracy", "labels right, against the most frequent", most_frequent, right)
        )
    return metrics
