"""Labels of texts: a head of their own, compared with always naming the most frequent one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loractl.common.job.spec import JobSpec
from loractl.worker.base.adapter import LABELS, read_labels
from loractl.worker.base.head import HEAD, Head, label_settings
from loractl.worker.base.learner import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import classified
from loractl.worker.evaluation.classifier import classify, evaluate_classifier
from loractl.worker.evaluation.evaluation import Evaluation, Work
from loractl.worker.evaluation.stretches import ROWS, Stretch

from .kind import Measuring, TrainedKind

MOST_NAMED = 8
"""Labels that an error lists at most."""


class TrainedClasses(TrainedKind):
    """Its baseline looks at no text, and its head answers in one pass."""

    def measured(self, learner: Learner) -> Sequence[str]:
        return ("the classifier",)

    def head(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> Head:
        return Head(labels=data.label_names, pad=tokenizer.pad_token_id, seed=spec.training.seed)

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

    def evaluate(self, work: Measuring) -> Evaluation:
        return evaluate_classifier(work.learner, work.data, work.spec, work.check_stop, work.progress, work.asked)

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
