"""The fleet: every device that a worker has reported, and what uses it."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loractl.common.placement.cards import Card
from loractl.common.settings import LEASE_S
from loractl.common.store.fleet import FleetView
from loractl.common.store.store import Store
from loractl.common.store.tables import DrainOrder, Node
from loractl.scheduler.wait.cards import SILENT_S


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """One device, as last seen, with what is known of it besides. Sizes in bytes."""

    row: Node

    card: Card  # as the placement rule sees it, with the jobs that run there
    closed_by: DrainOrder | None
    silent_s: float | None  # time since it was last seen; None: it is online
    failures: Mapping[str, int]  # the lab's failures there since its last good attempt, by reason, at most a day old
    spread: Mapping[int, tuple[str, ...]]  # all cards of each job there that runs on several

    def cards_of(self, job_id: int) -> tuple[str, ...]:
        """All cards of a job that runs there."""
        return self.spread.get(job_id, (self.row.node,))

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names, `free` as of now, and `reserved`, `open`, `jobs`, `contention`, `drained`
        and `failures`.

        `outside`: of each process its `pid`, `user`, `name` and `bytes`; `reserved`: bytes of running jobs; `open`:
        whether it takes jobs; `jobs`: `job_id`, `user` and `reserved` bytes of each that runs there, and all its
        `cards`; `contention`: how much longer a job takes for each other on such a card, at 1 twice as long (null: not
        measured, 0.5 is assumed); `drained`: null, or of the order its `user`, `reason` and `until` (null: until
        loractl undrain); `failures`: how many attempts failed there for the lab, by reason.
        """
        return {
            **self.row.as_json(),
            "free": self.card.free,
            "reserved": sum(job.reserved for job in self.card.running),
            "open": self.card.open,
            "jobs": [
                {"job_id": j.job_id, "user": j.user, "reserved": j.reserved, "cards": list(self.cards_of(j.job_id))}
                for j in self.card.running
            ],
            "contention": self.card.contention,
            "drained": None if self.closed_by is None else self.closed_by.as_json("user", "reason", "until"),
            "failures": dict(self.failures),
        }


STOPPED = "somebody's transaction holds the row fleet of locks: pg_stat_activity names it, pg_terminate_backend ends it"
"""What to do when no worker makes its rounds."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All devices at one moment, by name."""

    devices: tuple[DeviceState, ...]
    now: dt.datetime
    round_at: dt.datetime | None = None  # when a node last made the round for all

    @property
    def stopped_s(self) -> float | None:
        """Seconds since a node last made the round for all, though some are online; None if that is at most a lease.

        Until then expired leases are not ended, no job gives way, and no patience ends.
        """
        silent = None if self.round_at is None else (self.now - self.round_at).total_seconds()
        online = any(device.silent_s is None for device in self.devices)
        return silent if silent is not None and silent > LEASE_S and online else None

    def as_json(self) -> list[dict[str, Any]]:
        """Each device's fields."""
        return [device.as_json() for device in self.devices]

    @property
    def targets(self) -> frozenset[str]:
        """The boxes and their cards, by name, which can be drained."""
        return frozenset(name for device in self.devices for name in (device.row.node, device.row.host))

    def jobs_on(self, target: str) -> list[int]:
        """The jobs that run on a box or a card, by number."""
        devices = [device for device in self.devices if target in (device.row.node, device.row.host)]
        return sorted({job.job_id for device in devices for job in device.card.running})


def fleet(store: Store) -> Fleet:
    """Every device that a worker has reported, unless its row was removed."""
    return fleet_of(store.cards.fleet())


def fleet_of(view: FleetView) -> Fleet:
    """The devices of a view."""
    devices = tuple(_device(view.nodes[name], card, view) for name, card in view.cards.items())
    return Fleet(devices=devices, now=view.now, round_at=view.round_at)


def _device(node: Node, card: Card, view: FleetView) -> DeviceState:
    silent_s = (view.now - node.seen_at).total_seconds()
    return DeviceState(
        row=node,
        card=card,
        closed_by=view.drain_of(node.node),
        silent_s=silent_s if silent_s > SILENT_S else None,
        failures=Counter(failure.reason.value for failure in view.failures if failure.node == node.node),
        spread={job.job_id: names for job in card.running if len(names := tuple(view.cards_of(job.job_id))) > 1},
    )
