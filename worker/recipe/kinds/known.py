"""The kinds that there are."""

from __future__ import annotations

from loractl.common.job.sections import TaskType
from loractl.common.job.spec import JobSpec

from .answers import TrainedAnswers
from .classes import TrainedClasses
from .kind import TrainedKind
from .preferences import TrainedPreferences

_KINDS: dict[TaskType, TrainedKind] = {
    TaskType.CAUSAL_LM: TrainedAnswers(),
    TaskType.SEQ_CLS: TrainedClasses(),
    TaskType.PREFERENCE: TrainedPreferences(),
}


def trained_kind(spec: JobSpec) -> TrainedKind:
    """What a job learns to do."""
    return _KINDS[spec.task_type]
