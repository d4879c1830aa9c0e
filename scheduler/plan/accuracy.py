"""How well the memory plans did: predicted peaks against measured ones."""

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
        """Each row's `device_name`, `method`, `family`, `count`, and of measured over planned `ratio` (the mean),
        `spread` and `worst`; `factor`: what later plans are multiplied by, null while too little was measured.
        """
        return [{**vars(row), "factor": row.factor} for row in self.rows]


def plan_accuracy(store: Store) -> PlanAccuracy:
    """What all measured attempts say about the plans."""
    return PlanAccuracy(rows=tuple(accuracy(store.attempts.measured())))
