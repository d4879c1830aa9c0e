"""The fleet's round: one node at a time does what concerns all jobs, every few seconds.

It does not matter which. A node does nothing while the last round is young, or while another one is on its round.
"""

from __future__ import annotations

import datetime as dt

from loractl.common.store.queries.outbox.notices import tell_of_jobs_out_of_reach

from ...records import FleetTurn
from ...tables import LEASES, FleetRound
from ...transaction import Transaction
from ..changes import answer_wishes
from ..followers import release_left
from ..outbox.deliveries import tidy
from ..outbox.notices import NEWS_S, tell_of_cancelled_sweeps, tell_of_changes, tell_of_silence
from ..usage import refresh_quotas
from .nodes import read_cards

_REACH = "reach"

REACH_EVERY_S = 60.0
"""How often to check which jobs no card could ever hold."""

_SLOW_COMMIT_S = 60.0
"""A transaction is committed at most this long after the time that it wrote."""

GAP = 2 / 3
"""Of a lease. When no node went round for this long, live workers may not have reached the database either: after a
shorter outage none of their leases is over."""


def is_due(tx: Transaction, every_s: float) -> bool:
    row = tx.session.get(FleetRound, LEASES)
    # a clock that was set back must not end the rounds
    return row is None or not 0 <= (tx.now() - row.at).total_seconds() < every_s


def take_turn(tx: Transaction, every_s: float, settle_s: float) -> FleetTurn | None:
    if not tx.is_alone() or not is_due(tx, every_s):
        return None
    now, row = tx.now(), tx.session.get(FleetRound, LEASES)
    last_at = dt.datetime.min.replace(tzinfo=dt.UTC) if row is None else row.at - dt.timedelta(seconds=_SLOW_COMMIT_S)
    away = row is None or (now - row.at).total_seconds() > GAP * tx.lease_s
    settled_at = now + dt.timedelta(seconds=settle_s) if row is None or away else row.settled_at
    tx.put(FleetRound, "name", {"name": LEASES, "at": now, "settled_at": settled_at})
    settling = 0 < (settled_at - now).total_seconds() <= settle_s
    if not settling:
        tell_of_silence(tx, now)
    answer_wishes(tx)
    release_left(tx)
    refresh_quotas(tx)
    since = max(last_at, now - dt.timedelta(seconds=NEWS_S))
    tell_of_cancelled_sweeps(tx, since)
    tell_of_changes(tx, since)
    _look_at_reach(tx, now)
    tidy(tx, now)
    return FleetTurn(settling=settling)


def _look_at_reach(tx: Transaction, now: dt.datetime) -> None:
    last = tx.session.get(FleetRound, _REACH)
    if last is not None and 0 <= (now - last.at).total_seconds() < REACH_EVERY_S:
        return
    tx.put(FleetRound, "name", {"name": _REACH, "at": now, "settled_at": now})
    tell_of_jobs_out_of_reach(tx, read_cards(tx.session, now), now)
