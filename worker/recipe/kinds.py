"""Kinds of training: what each does with a model, from the base to the report. Their part of a job file is in
common/job/kinds.py.

Pairs are measured against reference scores: from the base model, or from the adapter that the job starts from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loractl.common.adapter_config import LABELS
from loractl.common.job.sections import DataFormat, TaskType
from loractl.common.job.spec import JobSpec
from loractl.worker.base.adapter import read_labels
from loractl.worker.base.model import HEAD, Head, Learner, label_settings
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.row_forms import form_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import CrossEntropy, LabelLoss, Loss, classified
from loractl.worker.engine.pairs import PairLoss
from loractl.worker.evaluation.classifier import classify, evaluate_classifier
from loractl.worker.evaluation.evaluation import Evaluation, EvaluationTask, Work, evaluate
from loractl.worker.evaluation.preferences import evaluate_preferences
from loractl.worker.evaluation.row_losses import score_rows
from loractl.worker.evaluation.stretches import ROWS, Stretch

from .reference import FrozenReference, KeptScores


class TrainedKind:
    """What a kind does with a model, from the base to the report. This one is for answers and texts: the base keeps its
    own head, and is the model with its adapter switched off. The others say what differs."""

    from_ancestor = False
    """Whether loss and report compare with lora.init_from's adapter instead of the bare base."""

    def measured(self, learner: Learner) -> Sequence[str]:
        """What an evaluation measures, in order."""
        return learner.compared_with, "the tuned model"

    def head(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> Head | None:
        """A head in place of the base's own; None: the base keeps its own."""
        return None

    def loss(self, spec: JobSpec) -> Loss:
        """The loss that rows are trained with."""
        return CrossEntropy(smoothing=spec.training.label_smoothing_factor)

    def refer(self, loss: Loss, learner: Learner, kept: KeptScores | None = None) -> FrozenReference | None:
        """Give a loss its reference model, if it needs one. `kept`: where its scores are left for later jobs."""
        return None

    def misfit(self, data: PreparedData, stored: Path) -> str | None:
        """How the rows differ from the stored adapter that the job starts from. Raises ArtifactError."""
        return None

    def leave(self, model: Any, folder: Path) -> None:
        """Write what users need besides the adapter's weights."""

    def answers(self, spec: JobSpec, data: PreparedData) -> int:
        """How many held-out rows are answered in full."""
        return min(spec.evaluation.samples, len(data.held_out.examples))

    def stretches(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> list[Stretch]:
        """The work of its evaluation."""
        work = Work.of(data, spec, tokenizer).with_shots(data, spec, tokenizer)
        return [*work.stretches, *work.shot_stretches, *(part.adapted for part in work.stretches)]

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        """One batch like its evaluation's, for a model in eval mode, to see whether it fits."""
        score_rows(learner.model, learner.tokenizer, rows, len(rows), scorer=learner.scorer, run=lambda piece: piece())

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """What the report says about the held-out rows."""
        return evaluate(task)

    def settings(self, labels: int | None) -> dict[str, Any]:
        """The keys that it needs in the model's config. `labels`: as planned."""
        return {}

    def built(self, config: Any, **options: Any) -> Any:
        """The model of a config, with meaningless weights."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, **options)

    def unquantised(self, model: Any) -> Sequence[str]:
        """Modules that bitsandbytes leaves alone."""
        from transformers.quantizers.base import get_keys_to_not_convert

        return list(get_keys_to_not_convert(model))

    def traced_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
        """The loss of a padded batch without content, all of it learned."""
        # only the loss of the output is kept, so that the logits are freed before the backward pass
        return model(**inputs, num_items_in_batch=count, labels=inputs["input_ids"])[0]


class TrainedPreferences(TrainedKind):
    """A model that answers, learned from pairs: how often and by how much the chosen answer is likelier."""

    from_ancestor = True

    def loss(self, spec: JobSpec) -> Loss:
        return PairLoss(spec.preference)

    def refer(self, loss: Loss, learner: Learner, kept: KeptScores | None = None) -> FrozenReference | None:
        assert isinstance(loss, PairLoss)
        if not loss.asked.has_reference:
            return None
        loss.reference = reference = FrozenReference(learner, kept)
        return reference

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        # an evaluation's batch has as many answers as this one has pairs: at worst the longest
        answers = [text for row in rows for text in form_of(DataFormat.PREFERENCE).texts(row)]
        super().score(learner, sorted(answers, key=lambda row: -len(row.input_ids))[: len(rows)])

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        return evaluate_preferences(task)


MOST_NAMED = 8
"""Labels that an error lists at most."""


class TrainedClasses(TrainedKind):
    """Labels of texts. Its own head answers in one pass; the baseline always names the most frequent label."""

    def measured(self, learner: Learner) -> Sequence[str]:
        return ("the classifier",)

    def head(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> Head:
        return Head(labels=data.label_names, pad=tokenizer.pad_token_id, seed=spec.training.seed)

    def loss(self, spec: JobSpec) -> Loss:
        return LabelLoss(smoothing=spec.training.label_smoothing_factor)

    def misfit(self, data: PreparedData, stored: Path) -> str | None:
        if (known := read_labels(stored)) == data.label_names:
            return None
        return f"the labels {', '.join(sorted({*known} ^ {*data.label_names})[:MOST_NAMED])}"

    def leave(self, model: Any, folder: Path) -> None:
        labels = [name for _, name in sorted(model.config.id2label.items())]
        (folder / LABELS).write_text(json.dumps(labels, indent=2) + "\n", "utf-8")

    def answers(self, spec: JobSpec, data: PreparedData) -> int:
        return 0

    def stretches(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> list[Stretch]:
        return [part for part in Work.of(data, spec, tokenizer).stretches if part.kind == ROWS]

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        classify(learner.model, learner.tokenizer.pad_token_id, rows, len(rows), run=lambda piece: piece())

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        return evaluate_classifier(task)

    def settings(self, labels: int | None) -> dict[str, Any]:
        return {**label_settings(list(map(str, range(labels or 0)))), "pad_token_id": 0}

    def built(self, config: Any, **options: Any) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_config(config, **options)

    def unquantised(self, model: Any) -> Sequence[str]:
        return [HEAD]

    def traced_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
        return classified(model(**inputs, num_items_in_batch=count)["logits"], labels, count, 0.0)


_KINDS: dict[TaskType, TrainedKind] = {
    TaskType.CAUSAL_LM: TrainedKind(),
    TaskType.SEQ_CLS: TrainedClasses(),
    TaskType.PREFERENCE: TrainedPreferences(),
}


def trained_kind(spec: JobSpec) -> TrainedKind:
    """What a job learns to do."""
    return _KINDS[spec.task_type]
