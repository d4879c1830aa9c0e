"""A node comes up: its row, and what an earlier process of it left running."""

from __future__ import annotations

from sqlalchemy import select

from loractl.common.errors import NameTaken

from ..fleet import NODE_STALE_S
from ..records import Arrival, NodeState
from ..tables import Node
from ..transaction import Transaction
from .cards.nodes import identity, server_of
from .endings import give_back


def arrive(tx: Transaction, state: NodeState) -> Arrival:
    """A node is about to serve: write its row, and give back what its predecessor left. Raises NameTaken.

    With `seen_at` in the answer nothing was done yet.
    """
    if (other := server_of(tx, state)) is not None:
        return Arrival(seen_at=other.seen_at, server=other.node)
    now, me = tx.now(), identity(state)
    # first, so that of two new nodes with one name the second waits here, and then finds the first
    tx.add_new(Node, [{**vars(state), "seen_at": now, "free": 0}])
    row = tx.session.scalars(select(Node).where(Node.node == state.node).with_for_update()).one()
    it = identity(row)
    if it == me or (now - row.seen_at).total_seconds() > NODE_STALE_S:
        for name, value in {**vars(me), "gpu": state.gpu, "seen_at": now}.items():
            setattr(row, name, value)  # from here on `server_of` finds it, and on no card that it had before
        return Arrival(given_back=tuple(give_back(tx, state.node)) if it == me else ())  # else that has its lease
    if it.instance != me.instance or it.machine not in (None, me.machine):
        raise NameTaken(state.node)
    return Arrival(seen_at=row.seen_at)
