"""The known kinds."""

from __future__ import annotations

from loractl.common.job.sections import TaskType

from .answers import Answers
from .classes import Classes
from .kind import TaskKind
from .preferences import Preferences

ANSWERS = Answers()
"""The kind of a job that names none."""

_KINDS: dict[TaskType, TaskKind] = {kind.task: kind for kind in (ANSWERS, Classes(), Preferences())}


def kind_of(task: str | None) -> TaskKind:
    """The kind of a `task_type`. A stored spec older than the key lacks it: such jobs learn to answer. Raises
    ValueError for an unknown kind."""
    return ANSWERS if task is None else _KINDS[TaskType(task)]
