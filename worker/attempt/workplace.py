"""What all attempts on one device share."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from loractl.common.settings import Settings
from loractl.common.store.store import Store
from loractl.worker.device.devices import Device
from loractl.worker.storage.client import StoreClient

from .drain import Drain

BEAT_S = 5.0
"""How often a running job's row is written; more often with a short lease. A cancel acts within this and a step."""

SLOW_S = 30.0
"""The store may say nothing for so long before a job's history says that it waits for it; less with a short lease."""

BEATS_A_LEASE = 6
"""The least number of beats in a lease: one or two may be late."""


class SpareSource(Protocol):
    """Who may have a trainer that has its imports behind it."""

    @property
    def marks(self) -> frozenset[str]:
        """Marks of processes that are no attempt's and no stray."""
        ...

    def take(self, environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
        """A trainer with this environment that now waits for its order; None: start one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """One device with its services."""

    settings: Settings
    store: Store
    artifacts: StoreClient
    device: Device
    node: str
    drain: Drain
    threads: int  # that a trainer may use
    spares: SpareSource | None = None  # None: every trainer starts cold

    @property
    def slow_s(self) -> float:
        """A call of the artifact store without an answer for so long is told, and may be left."""
        return min(SLOW_S, self.settings.lease_s / 2)

    @property
    def beat_s(self) -> float:
        return min(BEAT_S, self.settings.lease_s / BEATS_A_LEASE)
