"""Learning to go on with a text, as answers do."""

from __future__ import annotations

from collections.abc import Iterator

from loractl.common.job.sections import DataFormat, TaskType

from .kind import Sections, TaskKind


class Answers(TaskKind):
    """Answers of conversations and instructions, and plain text."""

    task = TaskType.CAUSAL_LM

    def unfit(self, spec: Sections) -> Iterator[str]:
        if spec.dataset.format is DataFormat.CLASSIFICATION:
            what = "is for task_type: SEQ_CLS, which learns labels; set that, or take another format"
            yield f"dataset.format: classification {what}"
