"""Pairs: how often and by how much the chosen answer is the likelier one, base against tuned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loractl.common.job.sections import DataFormat
from loractl.common.job.spec import JobSpec
from loractl.worker.base.batches import Computer
from loractl.worker.base.kept.knowledge import Once
from loractl.worker.base.learner import Learner
from loractl.worker.data.forms import form_of
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import BentLoss, Loss
from loractl.worker.engine.pairs import PairLoss
from loractl.worker.evaluation.evaluation import Evaluation
from loractl.worker.evaluation.preferences import evaluate_preferences
from loractl.worker.training.reference import FrozenReference

from .answers import TrainedAnswers


class TrainedPreferences(TrainedAnswers):
    """A model that answers, learned from pairs."""

    def loss(self, spec: JobSpec) -> BentLoss:
        return PairLoss(spec.preference)

    def refer(self, loss: Loss, learner: Learner, known: Callable[[str], dict[Any, Any]], *, begun: bool) -> None:
        assert isinstance(loss, PairLoss)
        if not loss.asked.has_reference:
            return
        weights = [p.detach().clone() for p in learner.model.parameters() if p.requires_grad] if begun else None
        question = f"reference of pairs, by {type(learner.scorer).__name__}"  # which rounds in its own way
        loss.reference = FrozenReference(learner, known(question), weights)

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        # an evaluation's batch has as many answers as this one has pairs: at worst the longest ones
        answers = [text for row in rows for text in form_of(DataFormat.PREFERENCE).texts(row)]
        super().score(learner, sorted(answers, key=lambda row: -len(row.input_ids))[: len(rows)])

    def evaluate(
        self,
        learner: Learner,
        data: PreparedData,
        spec: JobSpec,
        check_stop: Callable[[], None],
        progress: Callable[[int, int], None],
        once: Once[Any],
        asked: Computer,
        loss: Loss,
    ) -> Evaluation:
        assert isinstance(loss, PairLoss)
        near = None
        if isinstance(loss.reference, FrozenReference) and not loss.reference.is_base:
            rows, batch = data.held_out.rows.first(spec.evaluation.max_rows), spec.evaluation.per_device_eval_batch_size
            near = loss.reference.pairs(rows, batch, asked)
        return evaluate_preferences(learner, data, spec, check_stop, progress, once, asked, near)
