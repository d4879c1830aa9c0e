"""Pairs on held-out rows: how often and by how much base and tuned find the chosen answer likelier, and how their own
answers changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loractl.common.job.sections import Metric, PreferenceSpec
from loractl.common.job.spec import JobSpec
from loractl.common.verdict import NEW_ROWS
from loractl.worker.base.model import Learner, positions_of
from loractl.worker.data.prepared import PreparedData
from loractl.worker.engine.pairs import Pairs, margins, pair_losses

from .answers import Answer, answer_metrics, length_metrics, side_by_side, words
from .base_measurements import BaseMeasurements, MeasuredModel
from .comparison import Array, Compared, Measure, compare_shares
from .evaluation import Evaluation, Work, measure_both
from .row_losses import RowScores

LOSS = Measure(name="loss", label="preference loss")
NEW_ROWS_LOSS = Measure(name="new_rows_loss", label="preference loss, pairs like none that is trained on")
MARGIN = Measure(name="preference_margin", label="preference margin", higher_is_better=True)
CHOSEN_LOSS = Measure(name="chosen_loss", label="loss of chosen answers")
REPETITION = Measure(name="repetition", label="repetition", unit="%")

RUN = 4
"""The length, in words, of a run that counts as repeated."""


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """One model's scores of pairs, in order: of both answers, and of the prompts if the loss learns them."""

    chosen: RowScores
    rejected: RowScores
    given: RowScores

    @classmethod
    def of(cls, measured: MeasuredModel) -> PairScores:
        return cls(chosen=measured.rows, rejected=measured.rejected, given=measured.given)

    @property
    def tokens(self) -> Array:
        """The tokens of both answers of each pair."""
        return self.chosen.tokens + self.rejected.tokens

    @property
    def pairs(self) -> Pairs:
        """The same in the losses' form, in float64."""
        chosen, rejected = self.chosen, self.rejected
        prompts, prompt_tokens = (self.given.loss, self.given.tokens) if len(self.given.loss) else (0.0, 0.0)
        values = {
            "chosen": -chosen.loss,
            "rejected": -rejected.loss,
            "chosen_tokens": chosen.tokens,
            "rejected_tokens": rejected.tokens,
            "learned": -(chosen.loss + prompts),
            "learned_tokens": chosen.tokens + prompt_tokens,
        }
        return Pairs(**{name: torch.from_numpy(array) for name, array in values.items()})


def evaluate_preferences(
    learner: Learner,
    data: PreparedData,
    spec: JobSpec,
    check_stop: Callable[[], None],
    progress: Callable[[int, int], None] = lambda done, of: None,
    kept: BaseMeasurements | None = None,
) -> Evaluation:
    """Score both answers of every held-out pair, and let base and tuned answer the first `evaluation.samples` prompts.

    `kept`: see `evaluate`.
    """
    began = time.monotonic()
    work = Work.of(data, spec, learner.tokenizer, positions_of(learner.model))
    base, tuned, earlier = measure_both(learner, work, spec, check_stop, progress, kept)
    scores = PairScores.of(base), PairScores.of(tuned)
    losses = pair_row_losses(spec.preference, scores)
    answers, wanted = side_by_side(work.prompts, base.texts, tuned.texts), spec.evaluation.wanted
    given_away = np.isin(work.numbers, data.given_away)
    metrics = pair_metrics(spec.preference, scores, losses, wanted, given_away)
    return Evaluation(
        metrics=metrics + written_metrics(answers, learner.tokenizer),
        answers=answers,
        rows=len(work.numbers),
        seconds=time.monotonic() - began,
        row_losses=[
            (number, 1, round(float(before), 6), round(float(after), 6), int(tokens))
            for number, tokens, before, after in zip(work.numbers, scores[0].tokens, *losses, strict=True)
        ],
        given_away=int(given_away.sum()),
        base_measured=earlier,
        baseline=None if learner.started is None else learner.compared_with,
        against=learner.compared_with,
    )


def pair_row_losses(asked: PreferenceSpec, scores: tuple[PairScores, PairScores]) -> tuple[Array, Array]:
    """The loss of each pair, for base and for tuned. A term for the chosen answers is the mean over the pair's own
    tokens. The base is the reference."""
    near = scores[0].pairs

    def losses(of: PairScores) -> Array:
        pairs, weight = of.pairs, asked.answer_weight
        found = pair_losses(asked, pairs, near)
        return np.asarray((found - weight * pairs.learned / pairs.learned_tokens if weight else found).numpy())

    base, tuned = scores
    return losses(base), losses(tuned)


def pair_metrics(
    asked: PreferenceSpec,
    scores: tuple[PairScores, PairScores],
    losses: tuple[Array, Array],
    wanted: set[Metric],
    given_away: npt.NDArray[np.bool_],
) -> list[Compared]:
    """The measures of base and tuned on the pairs. `given_away`: by pair, whether a row to train on gives it away; loss
    and accuracy of the others are reported, too."""
    each = np.ones(len(given_away))
    base, tuned = (np.asarray(margins(asked, of.pairs).numpy()) for of in scores)
    new = ~given_away
    apart = bool(given_away.any() and new.any())
    metrics = [LOSS.compare(*losses, each)]
    if apart:
        metrics.append(NEW_ROWS_LOSS.compare(losses[0][new], losses[1][new], each[new]))
    if Metric.PREFERENCES in wanted:
        name, label = "preference_accuracy", "preference accuracy"
        metrics.append(compare_shares(name, label, (base > 0).tolist(), (tuned > 0).tolist()))
        if apart:
            name, label = f"{NEW_ROWS}{name}", f"{label}, pairs like none that is trained on"
            metrics.append(compare_shares(name, label, (base[new] > 0).tolist(), (tuned[new] > 0).tolist()))
        metrics.append(MARGIN.compare(base, tuned, each))
    chosen = [of.chosen for of in scores]
    return [*metrics, CHOSEN_LOSS.compare(chosen[0].loss, chosen[1].loss, chosen[0].tokens)]


def written_metrics(answers: Sequence[Answer], tokenizer: Any) -> list[Compared]:
    """How long the generated answers are, how much they repeat, and how many end by themselves."""
    if not answers:
        return []
    base, tuned = (np.array([repetition(getattr(a, who)) for a in answers], float) for who in ("base", "tuned"))
    repeated = REPETITION.compare(base, tuned, np.ones(len(answers)))
    return [*length_metrics(answers, tokenizer), repeated, *answer_metrics(answers, set())]


def repetition(text: str) -> float:
    """The share, in percent, of the text's runs of four words that occurred in it before."""
    said = words(text)
    runs = [tuple(said[place : place + RUN]) for place in range(len(said) - RUN + 1)]
    return 100 * (1 - len(set(runs)) / len(runs)) if runs else 0.0
