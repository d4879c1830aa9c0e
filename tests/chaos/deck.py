"""The faults, and in which order a seed deals them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

DECK = {
    "kill a node": 6,
    "kill a trainer": 3,
    "freeze a trainer": 2,
    "kill a rank that does not lead": 2,
    "freeze a rank that does not lead": 1,
    "kill the node of a gang's second card": 2,
    "freeze the node of a gang's second card": 1,
    "kill a box": 1,
    "stop a box in order": 1,
    "freeze a node": 3,
    "freeze a box": 1,
    "power cut, a checkpoint torn": 2,
    "power cut, a finished result torn": 1,
    "power cut, a cached data set torn": 1,
    "tear a stored checkpoint": 1,
    "kill Valkey": 1,
    "kill and wipe Valkey": 2,
    "crash PostgreSQL": 2,
    "start nodes in an outage of PostgreSQL": 2,
    "make PostgreSQL read-only": 2,
    "cut a box off PostgreSQL": 2,
    "cut a box off Valkey": 1,
    "cut submit off PostgreSQL": 1,
    "silence PostgreSQL, box to server": 1,
    "silence PostgreSQL, server to box": 1,
    "silence Valkey, box to server": 1,
    "silence Valkey, server to box": 1,
    "fill the store's disk": 2,
    "hang a box's calls of the store": 2,
    "kill a fork server": 1,
    "freeze a fork server": 1,
    "a box that is bad for good": 1,
    "kill a trainer in a checkpoint": 1,
    "kill a rank in a checkpoint": 2,
    "cancel a job": 3,
    "a hostile login that holds locks": 2,
    "hold a running job's row": 2,
    "use up PostgreSQL's connections": 1,
    "fill the database's disk": 1,
    "hold SQLite's write lock": 3,
    "slow a box's link to PostgreSQL": 1,
    "slow the store": 2,
    "kill the store's server": 1,
    "cut a box off the store": 1,
    "move a box's clock": 2,
}
"""How often each comes in one deck; decks are shuffled and dealt one after the other."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One card: when, what, for how long (a share of the longest), and which of the possible targets."""

    gap_s: float
    kind: str
    share: float
    pick: float


GANG_FAULTS = frozenset(kind for kind in DECK if "rank" in kind or "second card" in kind)

S3_FAULTS = frozenset({"slow the store", "kill the store's server", "cut a box off the store"})
DISK_FAULT, CLOCK_FAULT = "fill the database's disk", "move a box's clock"
SQLITE_FAULTS = frozenset({"hold SQLite's write lock"})
POSTGRES_FAULTS = frozenset(kind for kind in DECK if "PostgreSQL" in kind or "hostile" in kind or "row" in kind)


def script(
    seed: int, gap_s: float, without: frozenset[str] = frozenset(), first: Collection[str] = ()
) -> Iterator[Fault]:
    """The same seed gives the same script; what it hits hangs on what runs at that moment.

    `without`: faults that would meet nothing, or can't be had here. `first`: kinds that a short run is to have.
    """
    rng = random.Random(seed)
    for kind in first:
        yield Fault(gap_s=gap_s, kind=kind, share=rng.random(), pick=rng.random())
    while True:
        deck = [kind for kind, count in DECK.items() for _ in range(count) if kind not in without]
        rng.shuffle(deck)
        for kind in deck:
            yield Fault(gap_s=rng.uniform(0.3, 1.7) * gap_s, kind=kind, share=rng.random(), pick=rng.random())
