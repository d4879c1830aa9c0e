"""Learning to continue a text, as answers do."""

from __future__ import annotations

from collections.abc import Iterator

from loractl.common.job.sections import OF_PAIRS, DataFormat, TaskType

from .kind import Sections, TaskKind

OF_OTHERS = {
    DataFormat.CLASSIFICATION: "task_type: SEQ_CLS, which learns labels",
    DataFormat.PREFERENCE: "task_type: preference, which learns from pairs",
    DataFormat.PREFERENCE_TEXT: "task_type: preference, which learns from pairs",
}
"""Formats that contain no answer to learn."""


class Answers(TaskKind):
    """Answers of conversations and instructions, and plain text."""

    task = TaskType.CAUSAL_LM

    def unfit(self, spec: Sections) -> Iterator[str]:
        for format, kind in OF_OTHERS.items():
            if spec.dataset.format is format:
                yield f"dataset.format: {format.value} is for {kind}; set that, or take another format"
        if others := ", ".join(metric.value for metric in spec.evaluation.metrics if metric in OF_PAIRS):
            yield f"evaluation.metrics: {others} can't be measured of answers; task_type: preference learns from pairs"
