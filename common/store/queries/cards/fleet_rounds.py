"""The fleet's round: what concerns all jobs, one node at a time does for all, every few seconds.

It does not matter which. A node that comes by while the last round is young, or while another goes round, does nothing.
"""

from __future__ import annotations

import datetime as dt

from ...records import FleetTurn
from ...tables import FleetRound
from ...transaction import Transaction
from ..outbox.deliveries import tidy
from ..outbox.notices import tell_of_silence

_NAME = "leases"

GAP = 2 / 3
"""Of a lease. When nobody went round for so long, living workers may not have reached the database either: after a
shorter outage none of their leases is over."""


def is_due(tx: Transaction, every_s: float) -> bool:
    row = tx.session.get(FleetRound, _NAME)
    # a clock that was set back must not end the rounds
    return row is None or not 0 <= (tx.now() - row.at).total_seconds() < every_s


def take_turn(tx: Transaction, node: str, lease_s: float, every_s: float, settle_s: float) -> FleetTurn | None:
    if not tx.is_alone() or not is_due(tx, every_s):
        return None
    now, row = tx.now(), tx.session.get(FleetRound, _NAME)
    away = row is None or (now - row.at).total_seconds() > GAP * lease_s
    settled_at = now + dt.timedelta(seconds=settle_s) if row is None or away else row.settled_at
    tx.put(FleetRound, "name", {"name": _NAME, "node": node, "at": now, "settled_at": settled_at})
    settling = 0 < (settled_at - now).total_seconds() <= settle_s
    if not settling:
        tell_of_silence(tx, now)
    tidy(tx, now)
    return FleetTurn(settling=settling)
