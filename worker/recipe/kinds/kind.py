"""A kind of training: the part that needs a model. What a job file says of it is in common/job/kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loractl.common.job.spec import JobSpec
from loractl.worker.base.batches import Computer
from loractl.worker.base.head import Head
from loractl.worker.base.kept.knowledge import Once
from loractl.worker.base.learner import Learner
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import BentLoss, Loss
from loractl.worker.evaluation.evaluation import Evaluation
from loractl.worker.evaluation.stretches import Stretch


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What an evaluation needs; see `evaluate` of worker/evaluation."""

    learner: Learner
    data: PreparedData
    spec: JobSpec
    check_stop: Callable[[], None]
    progress: Callable[[int, int], None]
    once: Once[Any]
    asked: Computer


class TrainedKind(ABC):
    """What differs between kinds from the base to the report."""

    from_ancestor = False
    """Whether loss and report compare with the adapter that lora.init_from names, and not with the bare base."""

    def measured(self, learner: Learner) -> Sequence[str]:
        """What an evaluation measures, in its order."""
        return learner.compared_with, "the tuned model"

    def head(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> Head | None:
        """A head in place of the base's own; None: the base keeps its."""
        return None

    def loss(self, spec: JobSpec) -> BentLoss | None:
        """What is learned from rows; None: the model's own loss, by tokens or labels."""
        return None

    def refer(self, loss: Loss, learner: Learner, known: Callable[[str], dict[Any, Any]]) -> None:  # noqa: B027
        """Give a loss its reference model. `known`: what trainings of this process know of a thing."""

    def misfit(self, data: PreparedData, stored: Path) -> str | None:
        """How the rows differ from the stored adapter that the job starts from. Raises ArtifactError."""
        return None

    def leave(self, model: Any, folder: Path) -> None:  # noqa: B027
        """Write what users need besides the adapter's weights."""

    @abstractmethod
    def answers(self, spec: JobSpec, data: PreparedData) -> int:
        """How many held-out rows are answered in full."""

    @abstractmethod
    def stretches(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> list[Stretch]:
        """The work of its evaluation."""

    @abstractmethod
    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        """One batch as its evaluation does it, for a model in eval mode, to see whether it fits."""

    @abstractmethod
    def evaluate(self, work: Measuring) -> Evaluation:
        """What the report says of the held-out rows."""

    def settings(self, labels: int | None) -> dict[str, Any]:
        """Keys of the model's config that it needs. `labels`: as planned."""
        return {}

    @abstractmethod
    def built(self, config: Any, **options: Any) -> Any:
        """The model of a config, without weights that mean anything."""

    @abstractmethod
    def unquantised(self, model: Any) -> Sequence[str]:
        """Modules that bitsandbytes leaves alone."""

    @abstractmethod
    def traced_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
        """The loss of a padded batch without content, all of it learned."""
