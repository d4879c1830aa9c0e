"""The part of the store's face that a node uses for its device: its row, its end, what people ordered for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import select

from loractl.common.placement.cards import Card
from loractl.common.placement.pack_rule import MeasuredPass

from ..hosts import TrainerHost
from ..queries import endings
from ..queries.cards import hosts, nodes
from ..queries.cards.shares import running_on
from ..records import Arrival, BoxIdentity, Claim, NewHost, NodeState
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

    def serves_beside(self, node: str) -> bool:
        """Whether a job on several cards runs on the node's, which began on another one."""
        with self._read() as tx:
            return tx.session.scalars(running_on(node).limit(1)).first() is not None

    def keep_host(self, claim: Claim, new: NewHost) -> bool:
        """Write that a trainer stays with its base, while its attempt runs or is inside; False: its lease is lost, or
        the base has no room on the card. Once the attempt has ended and is out of it, it waits for a job."""
        with self._write() as tx:
            return hosts.keep(tx, claim, new)

    def open_host(self, claim: Claim, new: NewHost) -> bool:
        """Write that others may train beside an attempt, in its trainer, from now on; `new.bytes`: of the loaded base.

        False: its lease is lost, or the base has no room on the card.
        """
        with self._write() as tx:
            return hosts.open_to_others(tx, claim, new)

    def note_passes(self, host: str, passes: Sequence[MeasuredPass]) -> None:
        """Teach the law of a host's passes; one that has gone learns nothing."""
        with self._write() as tx:
            hosts.note_passes(tx, host, passes)

    def spoil_host(self, host: str, node: str, why: str) -> None:
        """Let no job join the host any more, which ends with its last one; `why`: in words, the first of them stays."""
        with self._write() as tx:
            hosts.spoil(tx, host, node, why)

    def leave_host(self, claim: Claim) -> None:
        """An attempt that has ended is out of its host: its tensors, threads and files are gone."""
        with self._write() as tx:
            hosts.leave(tx, claim)

    def send_off_host(self, host: str, node: str) -> bool:
        """Let no job join the host any more; False when one is in it. Its bytes stay held until it is forgotten."""
        with self._write() as tx:
            return hosts.send_off(tx, host, node)

    def forget_hosts(self, marks: Collection[str]) -> None:
        """The hosts' processes have ended, and the card has their room again."""
        with self._write() as tx:
            hosts.forget(tx, marks)

    def hosts(self, node: str) -> Collection[TrainerHost]:
        """The hosts of a card."""
        with self._read() as tx:
            return hosts.of_node(tx, node)

    def nodes(self, host: str | None = None) -> list[Node]:
        """All nodes, or those of a box."""
        every = select(Node).order_by(Node.node)
        return self._all(every if host is None else every.where(Node.host == host))

    def drains(self) -> dict[str, DrainOrder]:
        """Host or card -> the order that holds for it now."""
        with self._read() as tx:
            return nodes.drained_targets(tx.session, tx.now())
