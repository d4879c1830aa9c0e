"""The options of the box's owner for a device."""

from __future__ import annotations

from dataclasses import dataclass, field

from loractl.common.placement.cards import MARGIN_BYTES
from loractl.worker.device.occupancy import HIGH_WATER_S


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """The options of `loractl worker`, as its nodes get them."""

    margin: int = MARGIN_BYTES  # bytes that stay free
    max_jobs: int | None = None  # None: by the card's size
    user_limit: int | None = None  # running jobs that one user may have in the fleet
    labels: dict[str, str] = field(default_factory=dict)
    high_water_s: float = HIGH_WATER_S  # other people's memory stays theirs for so long
    spare: bool | None = None  # whether a trainer is kept ready; None: on GPUs
    keep_warm_s: float = 0.0  # a trainer stays with its base for so long after its job; 0: not at all
    until: float | None = None  # when the worker stops by itself, by the database's clock, in seconds since 1970
    window_s: float | None = None  # from its start until then
    grace_s: float | None = None  # how long a stop may take; None: as long as it needs
    devices: int = 1  # that share the box's cores
