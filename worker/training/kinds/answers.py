"""Answers and texts: base against tuned, the base being the model with its adapter switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loractl.common.job.spec import JobSpec
from loractl.worker.base.batches import Computer
from loractl.worker.base.kept.knowledge import Once
from loractl.worker.base.learner import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import BentLoss, Loss
from loractl.worker.evaluation.evaluation import Evaluation, Work, evaluate
from loractl.worker.evaluation.losses import score_rows
from loractl.worker.evaluation.stretches import Stretch


class TrainedAnswers:
    """It keeps the base's own head."""

    measured: Sequence[str] = ("the base", "the tuned model")

    def head(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> None:
        return None

    def loss(self, spec: JobSpec) -> BentLoss | None:
        return None

    def refer(self, loss: Loss, learner: Learner, known: Callable[[str], dict[Any, Any]], *, begun: bool) -> None:
        """It is compared with nothing."""

    def misfit(self, data: PreparedData, stored: Path) -> str | None:
        return None

    def leave(self, model: Any, folder: Path) -> None:
        """The weights are all."""

    def answers(self, spec: JobSpec, data: PreparedData) -> int:
        return min(spec.evaluation.samples, len(data.held_out_examples))

    def stretches(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> list[Stretch]:
        work = Work.of(data, spec, tokenizer).stretches
        return [*work, *(part.adapted for part in work)]

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        score_rows(learner.model, learner.tokenizer, rows, len(rows), scorer=learner.scorer, run=lambda piece: piece())

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
        return evaluate(learner, data, spec, check_stop, progress, once, asked)

    def settings(self, labels: int | None) -> dict[str, Any]:
        return {}

    def built(self, config: Any, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, **options)

    def unquantised(self, model: Any) -> Sequence[str]:
        from transformers.quantizers.base import get_keys_to_not_convert

        return list(get_keys_to_not_convert(model))

    def traced_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
        # of the output the loss alone is kept, so that the logits are gone by the backward pass
        return model(**inputs, num_items_in_batch=count, labels=inputs["input_ids"])[0]
