"""Pairs on held-out rows: how often and by how much base and tuned find the chosen answer likelier, and how their own
answers changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loractl.common.job.sections import Metric, PreferenceSpec
from loractl.common.verdict import NEW_ROWS
from loractl.worker.base.model import positions_of
from loractl.worker.engine.pairs import Pairs, margins, pair_losses

from .answers import Answer, answer_metrics, length_metrics, side_by_side, words
from .base_measurements import MeasuredModel
from .comparison import Array, Compared, Measure, compare_shares
from .evaluation import Evaluation, EvaluationTask, Work, measure_both

LOSS = Measure(name="loss", label="preference loss")
NEW_ROWS_LOSS = Measure(name="new_rows_loss", label="preference loss, pairs like none that is trained on")
MARGIN = Measure(name="preference_margin", label="preference margin", higher_is_better=True)
CHOSEN_LOSS = Measure(name="chosen_loss", label="loss of chosen answers")
REPETITION = Measure(name="repetition", label="repetition", unit="%")

RUN = 4
"""The length, in words, of a run that counts as repeated."""


def evaluate_preferences(task: EvaluationTask) -> Evaluation:
    """Score both answers of every held-out pair, and let base and tuned answer the first `evaluation.samples`
    prompts."""
    began, learner, data, spec = time.monotonic(), task.learner, task.data, task.spec
    work = Work.of(data, spec, learner.tokenizer, positions_of(learner.model))
    base, tuned, earlier = measure_both(task, work)
    losses = pair_row_losses(spec.preference, base, tuned)
    answers, wanted = side_by_side(work.prompts, base.texts, tuned.texts), spec.evaluation.wanted
    given_away = np.isin(work.numbers, data.held_out.given_away)
    metrics = pair_metrics(spec.preference, (base, tuned), losses, wanted, given_away)
    return Evaluation(
        metrics=metrics + written_metrics(answers, learner.tokenizer),
        answers=answers,
        rows=len(work.numbers),
        seconds=time.monotonic() - began,
        row_losses=[
            (number, 1, round(float(before), 6), round(float(after), 6), int(tokens))
            for number, tokens, before, after in zip(
                work.numbers, base.rows.tokens + base.rejected.tokens, *losses, strict=True
            )
        ],
        given_away=int(given_away.sum()),
        base_measured=earlier,
        baseline=None if learner.started is None else learner.compared_with,
        against=learner.compared_with,
    )


def measured_pairs(measured: MeasuredModel) -> Pairs:
    """One model's scores of pairs in the losses' form, in float64."""
    chosen, rejected, given = measured.rows, measured.rejected, measured.given  # given: if the loss learns prompts
    prompts, prompt_tokens = (given.loss, given.tokens) if len(given.loss) else (0.0, 0.0)
    values = {
        "chosen": -chosen.loss,
        "rejected": -rejected.loss,
        "chosen_tokens": chosen.tokens,
        "rejected_tokens": rejected.tokens,
        "learned": -(chosen.loss + prompts),
        "learned_tokens": chosen.tokens + prompt_tokens,
    }
    return Pairs(**{name: torch.from_numpy(array) for name, array in values.items()})


def pair_row_losses(asked: PreferenceSpec, base: MeasuredModel, tuned: MeasuredModel) -> tuple[Array, Array]:
    """The loss of each pair, for base and for tuned. A term for the chosen answers is the mean over the pair's own
    tokens. The base is the reference."""
    near = measured_pairs(base)

    def losses(of: MeasuredModel) -> Array:
        pairs, weight = measured_pairs(of), asked.answer_weight
        found = pair_losses(asked, pairs, near)
        return np.asarray((found - weight * pairs.learned / pairs.learned_tokens if weight else found).numpy())

    return losses(base), losses(tuned)


def pair_metrics(
    asked: PreferenceSpec,
    measured: tuple[MeasuredModel, MeasuredModel],
    losses: tuple[Array, Array],
    wanted: set[Metric],
    given_away: npt.NDArray[np.bool_],
) -> list[Compared]:
    """The measures of base and tuned on the pairs. `given_away`: by pair, whether a row to train on gives it away; loss
    and accuracy of the others are reported, too."""
    each = np.ones(len(given_away))
    base, tuned = (np.asarray(margins(asked, measured_pairs(of)).numpy()) for of in measured)
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
    before, after = (of.rows for of in measured)
    return [*metrics, CHOSEN_LOSS.compare(before.loss, after.loss, before.tokens)]


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
