"""The part of the store's face that a node uses for its device: its row, its end, what people ordered for it."""

from __future__ import annotations

from sqlalchemy import select

from loractl.common.placement.cards import Card

from ..queries import endings
from ..queries.cards import nodes
from ..records import Arrival, BoxIdentity, NodeState
from ..tables import DrainOrder, Node
from .views import ViewStore


class DeviceStore(ViewStore):
    """The jobs' database as a node sees it that looks after a device."""

    def arrive(self, state: NodeState) -> Arrival:
        """A node is about to serve: write its row, give back what its predecessor left. Raises NameTaken.

        With `seen_at` in the answer nothing was done yet.
        """
        with self._write() as tx:
            return nodes.arrive(tx, state, endings.give_back)

    def see_node(self, state: NodeState) -> Card:
        """Write a device's row, last seen now. Returns the card with what runs on it. Raises NameTaken."""
        with self._write() as tx:
            return nodes.see(tx, state)

    def forget_node(self, node: str, box: BoxIdentity | None = None) -> None:
        """Remove the row of a node that has stopped in order, unless another box has its name."""
        with self._write() as tx:
            nodes.forget(tx, node, box)

    def tokens(self, node: str) -> set[str]:
        """The tokens of the attempts that run on a node."""
        with self._read() as tx:
            return nodes.read_tokens(tx, node)

    def nodes(self, host: str | None = None) -> list[Node]:
        """All nodes, or those of a box."""
        every = select(Node).order_by(Node.node)
        return self._all(every if host is None else every.where(Node.host == host))

    def drains(self) -> dict[str, DrainOrder]:
        """Host or card -> the order that holds for it now."""
        with self._read() as tx:
            return nodes.drained_targets(tx.session, tx.now())
