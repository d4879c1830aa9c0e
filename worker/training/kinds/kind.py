"""A kind of training, as far as a model is needed for it. What a job file says of it is in common/job/kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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


class TrainedKind(Protocol):
    """What differs between kinds from the base to the report."""

    measured: Sequence[str]
    """What an evaluation measures, one after the other."""

    def head(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> Head | None:
        """A head in place of the base's own; None: the base keeps its."""

    def loss(self, spec: JobSpec) -> BentLoss | None:
        """What is learned from rows; None: the model's own loss, by tokens or labels."""

    def refer(self, loss: Loss, learner: Learner, known: Callable[[str], dict[Any, Any]], *, begun: bool) -> None:
        """Let its loss know the model that the adapter is compared with. `known`: what trainings of this process have
        found out about something; `begun`: the adapter has the weights of a stored one."""

    def misfit(self, data: PreparedData, stored: Path) -> str | None:
        """What the rows and a stored adapter, from which the job is to begin, differ in. Raises ArtifactError."""

    def leave(self, model: Any, folder: Path) -> None:
        """Write what its users need beside an adapter's weights."""

    def answers(self, spec: JobSpec, data: PreparedData) -> int:
        """How many held-out rows are answered in full."""

    def stretches(self, spec: JobSpec, data: PreparedData, tokenizer: Any) -> list[Stretch]:
        """The work of its evaluation."""

    def score(self, learner: Learner, rows: list[TokenRow]) -> None:
        """One batch as its evaluation does it, for a model in eval mode, to see whether it fits."""

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
        """What the report says of the held-out rows. `loss`: that was learned."""

    def settings(self, labels: int | None) -> dict[str, Any]:
        """Keys of the model's config that it needs. `labels`: as planned."""

    def built(self, config: Any, **options: Any) -> Any:
        """The model of a config, without weights that mean anything."""

    def unquantised(self, model: Any) -> Sequence[str]:
        """Modules that bitsandbytes leaves alone."""

    def traced_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
        """The loss of a padded batch without content, all of it learned."""
