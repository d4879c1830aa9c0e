"""The outbox: messages that wait for a channel."""

from __future__ import annotations

from collections.abc import Sequence

from loractl.common.channel.channels import Channel

from ..queries.outbox import deliveries
from ..records import Parcel
from .verb import Subject, reads, writes


class OutboxVerbs(Subject):
    """Verbs about messages."""

    settle = writes(deliveries.settle)
    stuck = reads(deliveries.read_stuck)
    traffic = reads(deliveries.read_traffic)

    def lease(self, channels: Sequence[Channel], lease_s: float) -> Parcel | None:
        """The oldest message that is due on one of the channels; for `lease_s` nobody else gets it. None: none is."""
        with self._read() as tx:
            if not deliveries.is_due(tx, channels):
                return None
        with self._write() as tx:
            return deliveries.lease(tx, channels, lease_s)
