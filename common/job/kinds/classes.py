"""Learning to name a text's label, with a head that has nothing but labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loractl.common.job.sections import DataFormat, Metric, TaskType, is_set

from .kind import Sections, TaskKind

MEASURED = (Metric.LOSS, Metric.LABELS)
"""What can be measured of a classifier, which generates nothing."""

UNREAD_LABELS = 100
"""A classifier's labels while its data have not been read: more than most have, and less than 10 MiB of head."""

HEADS = frozenset({"lm_head", "embed_out", "score", "classifier"})
"""Models' names for the layer after their last block."""


class Classes(TaskKind):
    """Labels of texts."""

    task = TaskType.SEQ_CLS
    peft = "SEQ_CLS"
    padded = "a classifier's head looks for a row's last token before the padding"
    alone = "a classifier changes its base's head"
    writes = False
    loss_of = "row"

    def defaults(self, written: dict[str, Any]) -> dict[str, Any]:
        """One format, and nothing to generate."""
        value = {"evaluation": {}, **written}
        dataset, evaluation = value.get("dataset"), value["evaluation"]
        if isinstance(dataset, dict) and dataset.get("format", DataFormat.AUTO) == DataFormat.AUTO:
            value["dataset"] = {**dataset, "format": DataFormat.CLASSIFICATION}
        if isinstance(evaluation, dict):
            metrics = evaluation.get("metrics", list(MEASURED))
            told = isinstance(metrics, list) and all(metric in list(MEASURED) for metric in metrics)
            # the error for metrics that can't be measured names the task, not the samples that they would need
            value["evaluation"] = {"metrics": metrics, **({"samples": 0} if told else {}), **evaluation}
        return value

    def unfit(self, spec: Sections) -> Iterator[str]:
        dataset, evaluation = spec.dataset, spec.evaluation
        if dataset.format is not DataFormat.CLASSIFICATION:
            what = (
                "has no labels: SEQ_CLS reads classification, rows with text and label (dataset.columns renames yours)"
            )
            yield f"dataset.format: {dataset.format.value} {what}"
        if others := ", ".join(m.value for m in evaluation.metrics if m not in MEASURED):
            yield f"evaluation.metrics: a classifier generates nothing: {others} can't be measured, loss and labels can"
        if evaluation.samples and is_set(evaluation, "samples"):
            yield "evaluation.samples: a classifier generates no answers; leave it out"
        if evaluation.regression is not None:
            yield "evaluation.regression: a classifier's head knows nothing but its labels; leave it out"
        if evaluation.lm_eval:
            yield "evaluation.lm_eval: a classifier generates no text, which these tasks need; leave it out"
        if spec.training.packing:
            yield "training.packing: a classifier's row is one text with one label; set packing: false"
        if named := ", ".join(name for name in spec.lora.modules_to_save if name.rpartition(".")[2] in HEADS):
            what = "a classifier has only its own head, which is trained in full and stored as it is"
            yield f"lora.modules_to_save: {named}: {what}; leave it out"

    def idle(self, spec: Sections) -> Iterator[str]:
        yield from super().idle(spec)
        if is_set(spec.evaluation, "max_new_tokens"):
            yield "evaluation.max_new_tokens: a classifier generates no answers; leave it out"

    def planned_labels(self, known: int | None) -> int | None:
        return known or UNREAD_LABELS
