"""Cards: the nodes that serve them, what people ordered for them, and what the rule gives them."""

from __future__ import annotations

from ..queries import arrivals
from ..queries.cards import decisions, fleet_rounds, nodes, preemption
from ..records import FleetTurn
from .verb import Subject, lists, reads, writes


class CardVerbs(Subject):
    """Verbs about cards and their nodes."""

    arrive = writes(arrivals.arrive)
    see = writes(nodes.see)
    forget = writes(nodes.forget)
    tokens = reads(nodes.read_tokens)
    serves_beside = reads(nodes.serves_beside)

    drains = reads(nodes.read_drains)
    drain = writes(nodes.drain)
    end_drain = writes(nodes.end_drain)

    fleet = reads(decisions.read_view)
    newcomers = reads(decisions.read_newcomers)
    would_start = reads(decisions.read_start)
    preempt = writes(preemption.preempt)

    nodes = lists(nodes.nodes)  # last: it hides the module

    def take_turn(self, node: str, every_s: float, settle_s: float) -> FleetTurn | None:
        """The node's turn to do what concerns the whole fleet: reap, preempt, end_patience.

        None when another does so now, or did within `every_s`. After an outage of the database living workers have
        `settle_s` before a turn may end leases.
        """
        with self._read() as tx:
            if not fleet_rounds.is_due(tx, every_s):
                return None
        with self._write() as tx:
            return fleet_rounds.take_turn(tx, node, every_s, settle_s)
