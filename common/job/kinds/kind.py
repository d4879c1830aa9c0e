"""A kind of training: the part that needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from loractl.common.job.preference import PreferenceSpec
from loractl.common.job.sections import (
    DatasetSpec,
    EvaluationSpec,
    LoraSpec,
    ResourcesSpec,
    TaskType,
    TrainingSpec,
)


class Sections(Protocol):
    """The sections of a job file that a kind checks."""

    @property
    def dataset(self) -> DatasetSpec: ...

    @property
    def lora(self) -> LoraSpec: ...

    @property
    def training(self) -> TrainingSpec: ...

    @property
    def preference(self) -> PreferenceSpec: ...

    @property
    def evaluation(self) -> EvaluationSpec: ...

    @property
    def resources(self) -> ResourcesSpec: ...


class TaskKind:
    """What a job learns to do. Code asks the kind and never compares task names. To add one, write a module here and,
    for the parts that need a model, a class in worker/recipe/kinds.py."""

    task: TaskType
    peft = "CAUSAL_LM"
    """peft's word for what its adapter is added to."""
    padded: str | None = None
    """Why its rows need padding; None: they need none."""
    alone: str | None = None
    """Why its base can't be shared with other jobs; None: it can."""
    writes = True
    """Whether its adapter continues a text, so that `generate`, `chat` and `serve` can ask it."""
    loss_of = "token"
    """What a loss is the mean of."""
    halves = 1
    """How many texts of up to dataset.max_length tokens one row holds."""

    def defaults(self, written: dict[str, Any]) -> dict[str, Any]:
        """A job file with the defaults that differ for the kind."""
        return written

    def unfit(self, spec: Sections) -> Iterator[str]:
        """ "key: sentence" for each key that means nothing for the kind."""
        yield from ()

    def undivided(self, spec: Sections) -> str | None:
        """Why several cards can't share the job; None: they can."""
        return None

    def idle(self, spec: Sections) -> Iterator[str]:
        """The same for keys of a job file that would have no effect; a stored spec may have them."""
        if spec.preference != PreferenceSpec():
            yield "preference: is for task_type: preference, which learns from pairs; leave it out"

    def loss_by(self, spec: Mapping[str, Any], begun_from: str | None) -> Any:
        """What decides which loss a job has: equal for jobs whose losses can be compared. `spec`: as it is stored.
        `begun_from`: sha256 of the adapter that it began from."""
        return None

    def planned_labels(self, known: int | None) -> int | None:
        """Outputs of a head of its own, where it has one. `known`: those that its data name, once they are read."""
        return None
