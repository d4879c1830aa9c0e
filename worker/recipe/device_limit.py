"""How much of its device a process may take: the base, and each member's own part."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from loractl.worker.base.gauge import hold_to, limit_to
from loractl.worker.protocol.messages import Start


@dataclass(frozen=True, kw_only=True)
class _Share:
    order: Start
    bytes: int | None  # None: no limit


@dataclass(kw_only=True)
class DeviceLimit:
    """The limit of a process, which is reset whenever a member comes or goes. Any thread may call it.

    On a card the members' parts are added up, plus the base's bytes once the member that loaded it is gone. On a CPU a
    limit is what the box's owner grants a trainer process, so several members share it.
    """

    _shares: dict[int, _Share] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def grant(self, order: Start, limit: int | None, base_bytes: int) -> None:
        """Let a member take this much; called in its thread before it computes. `base_bytes`: of a base already
        loaded."""
        with self._lock:
            self._shares[order.job_id] = _Share(order=order, bytes=limit)
            hold_to(self.total(base_bytes), order.device, order.gpu)

    def lower(self, order: Start, limit: int | None, base_bytes: int) -> None:
        """Note that a member needs less than it was granted."""
        with self._lock:
            self._shares[order.job_id] = _Share(order=order, bytes=limit)
            limit_to(self.total(base_bytes), order.device, order.gpu)

    def take_back(self, order: Start, base_bytes: int) -> None:
        """Note that a member is gone."""
        with self._lock:
            self._shares.pop(order.job_id, None)
            if self._shares:
                limit_to(self.total(base_bytes), order.device, order.gpu)

    def total(self, base_bytes: int) -> int | None:
        """Bytes for all current members; None: no limit."""
        parts = [share.bytes for share in self._shares.values() if share.bytes is not None]
        if len(parts) < len(self._shares) or not parts:
            return None
        orders = [share.order for share in self._shares.values()]
        if orders[0].device == "cpu":
            return max(parts)
        return sum(parts) + (base_bytes if all(order.joins for order in orders) else 0)
