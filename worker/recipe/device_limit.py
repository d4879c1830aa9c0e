"""What a process may take of its device: the base, and each member's own part."""

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
    """The limit of a process, which is set anew whenever a member comes or goes. Any thread may call it.

    On a card the members' parts are added up, with the base's bytes once the one that brought them has gone. On a
    processor a limit is what the box's owner grants a trainer process, so that several share it.
    """

    _shares: dict[int, _Share] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def grant(self, order: Start, limit: int | None, base_bytes: int) -> None:
        """Let a member take so much; called in its thread before it computes. `base_bytes`: of a base that is here."""
        with self._lock:
            self._shares[order.job_id] = _Share(order=order, bytes=limit)
            hold_to(self.total(base_bytes), order.device, order.gpu)

    def lower(self, order: Start, limit: int | None, base_bytes: int) -> None:
        """A member needs less than it was granted."""
        with self._lock:
            self._shares[order.job_id] = _Share(order=order, bytes=limit)
            limit_to(self.total(base_bytes), order.device, order.gpu)

    def take_back(self, order: Start, base_bytes: int) -> None:
        """A member has gone."""
        with self._lock:
            self._shares.pop(order.job_id, None)
            if self._shares:
                limit_to(self.total(base_bytes), order.device, order.gpu)

    def total(self, base_bytes: int) -> int | None:
        """Bytes for all that are here; None: no limit."""
        parts = [share.bytes for share in self._shares.values() if share.bytes is not None]
        if len(parts) < len(self._shares) or not parts:
            return None
        orders = [share.order for share in self._shares.values()]
        if orders[0].device == "cpu":
            return max(parts)
        return sum(parts) + (base_bytes if all(order.joins for order in orders) else 0)
