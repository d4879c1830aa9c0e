"""How accurate the memory plans were: predicted against measured peaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.memory.correction import Accuracy, accuracy

if TYPE_CHECKING:
    from loractl.common.store.store import Store


@dataclass(frozen=True, kw_only=True)
class PlanAccuracy:
    """Predicted against measured, by device model, method and family."""

    rows: tuple[Accuracy, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """Each row's `device_name`, `method`, `family`, `count`, and of measured over planned the `ratio` (the mean),
        `spread` and `worst`; `factor`: what later plans are multiplied by, null while there are too few
        measurements."""
        return [{**vars(row), "factor": row.factor} for row in self.rows]


def plan_accuracy(store: Store) -> PlanAccuracy:
    """What all measured attempts say about the plans' accuracy."""
    return PlanAccuracy(rows=tuple(accuracy(store.attempts.measured())))
