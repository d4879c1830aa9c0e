"""Answers and texts: base against tuned, the base being the model with its adapter switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loractl.common.job.spec import JobSpec
from loractl.worker.base.learner import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.tokens import TokenRow
from loractl.worker.evaluation.evaluation import Evaluation, Work, evaluate
from loractl.worker.evaluation.row_losses import score_rows
from loractl.worker.evaluation.stretches import Stretch

from .kind import Measuring, TrainedKind


class TrainedAnswers(TrainedKind):
    """It keeps the base's own head."""

    def answers(self, spec: JobSpec, data: PreparedData) -> int:
        return min(spec.evaluation.samples, len(data.held_out_examples))

    def stretches(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> list[Stretch]:
        work = Work.of(data, spec, tokenizer).stretches
        return [*work, *(part.adapted for part in work)]

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        score_rows(learner.model, learner.tokenizer, rows, len(rows), scorer=learner.scorer, run=lambda piece: piece())

    def evaluate(self, work: Measuring) -> Evaluation:
        return evaluate(work.learner, work.data, work.spec, work.check_stop, work.progress, work.once, work.asked)

    def built(self, config: Any, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, **options)

    def unquantised(self, model: Any) -> Sequence[str]:
        from transformers.quantizers.base import get_keys_to_not_convert

        return list(get_keys_to_not_convert(model))

    def traced_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
        # of the output the loss alone is kept, so that the logits are gone by the backward pass
        return model(**inputs, num_items_in_batch=count, labels=inputs["input_ids"])[0]
