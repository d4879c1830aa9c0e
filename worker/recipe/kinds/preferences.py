"""Pairs: how often and by how much the chosen answer is the likelier one, base against tuned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loractl.common.job.sections import DataFormat
from loractl.common.job.spec import JobSpec
from loractl.worker.base.learner import Learner
from loractl.worker.data.row_forms import form_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import BentLoss, Loss
from loractl.worker.engine.pairs import PairLoss
from loractl.worker.evaluation.evaluation import Evaluation
from loractl.worker.evaluation.preferences import evaluate_preferences
from loractl.worker.recipe.reference import FrozenReference

from .answers import TrainedAnswers
from .kind import Measuring


class TrainedPreferences(TrainedAnswers):
    """A model that answers, learned from pairs."""

    from_ancestor = True

    def loss(self, spec: JobSpec) -> BentLoss:
        return PairLoss(spec.preference)

    def refer(self, loss: Loss, learner: Learner, known: Callable[[str], dict[Any, Any]]) -> None:
        assert isinstance(loss, PairLoss)
        if loss.asked.has_reference:
            question = f"reference of pairs, by {type(learner.scorer).__name__}"  # which rounds in its own way
            loss.reference = FrozenReference(learner, known(question))

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        # an evaluation's batch has as many answers as this one has pairs: at worst the longest ones
        answers = [text for row in rows for text in form_of(DataFormat.PREFERENCE).texts(row)]
        super().score(learner, sorted(answers, key=lambda row: -len(row.input_ids))[: len(rows)])

    def evaluate(self, work: Measuring) -> Evaluation:
        return evaluate_preferences(
            work.learner, work.data, work.spec, work.check_stop, work.progress, work.once, work.asked
        )
