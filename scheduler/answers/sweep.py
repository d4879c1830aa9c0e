"""A sweep: where its members stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loractl.common.job.sweep import SweepView
    from loractl.common.store.store import Store


@dataclass(frozen=True, kw_only=True)
class SweepStanding:
    """A sweep at one moment."""

    sweep: SweepView

    def as_json(self) -> dict[str, Any]:
        """The sweep as JSON values."""
        from loractl.scheduler.text.sweep import fields

        return fields(self.sweep)


def sweep_standing(store: Store, sweep_id: int) -> SweepStanding:
    """Where a sweep's members stand. Raises SweepNotFound."""
    return SweepStanding(sweep=store.sweep(sweep_id))
