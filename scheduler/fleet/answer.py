"""The fleet: every device that a worker has reported, and what uses it."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.placement.cards import Card
from loractl.common.settings import LEASE_S
from loractl.common.store.fleet import FleetView
from loractl.scheduler.wait.cards import SILENT_S

if TYPE_CHECKING:
    from loractl.common.store.store import Store
    from loractl.common.store.tables import DrainOrder, Node


@dataclass(frozen=True, kw_only=True)
class ClosedBy:
    """A person's order to keep a card empty."""

    user: str
    reason: str
    until: dt.datetime | None  # None: until loractl undrain

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return {**vars(self), "until": None if self.until is None else self.until.isoformat()}


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """One device, as last seen. Sizes in bytes."""

    node: str  # host:index
    host: str
    gpu: str  # UUID
    device_name: str
    kind: str  # nvml, cpu, sim
    total: int
    free: int  # what a new job may take
    reserved: int  # by running jobs
    outside: tuple[Mapping[str, Any], ...]  # processes of other people: `pid`, `user`, `name`, `bytes`
    outside_bytes: int  # held by programs that are not ours, now or a short while ago
    used: Mapping[str, Any]  # bytes measured now, by job
    margin: int  # what the box's owner keeps free
    max_jobs: int
    user_limit: int | None  # running jobs allowed per user
    labels: Mapping[str, str]
    load: int | None  # percent
    temperature: int | None  # °C
    versions: Mapping[str, str]
    draining: bool  # its worker is stopping
    gangs: bool  # its worker serves jobs on several cards
    keeps_jobs: bool  # its jobs yield to no shorter ones
    fault: str | None  # why nothing can run on it, with the next step
    self_test: Mapping[str, Any] | None  # what it showed before it served; null: it had none
    instance: str | None  # of the box: two boxes may call themselves the same
    machine: str | None  # its machine-id, of which a home may be a copy
    boot: str | None  # its boot id, of which a whole machine may be a copy
    until: dt.datetime | None  # when its worker stops by itself; null: it stays
    window_s: float | None  # from its worker's start until then
    seen_at: dt.datetime

    card: Card  # as the placement rule sees it, with the jobs that run there
    closed_by: ClosedBy | None
    silent_s: float | None  # time since it was last seen; None: it is online
    failures: Mapping[str, int]  # the lab's failures there since its last good attempt, by reason, at most a day old
    spread: Mapping[int, tuple[str, ...]]  # all cards of each job there that runs on several

    def cards_of(self, job_id: int) -> tuple[str, ...]:
        """All cards of a job that runs there."""
        return self.spread.get(job_id, (self.node,))

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names, and `open`, `jobs`, `drained` and `failures`.

        `open`: whether it takes jobs; `jobs`: `job_id`, `user` and `reserved` bytes of each that runs there, and all
        its `cards`; `drained`: by whom, why and until when, or null; `failures`: how many attempts failed there for the
        lab, by reason.
        """
        columns = {name: getattr(self, name) for name in DEVICE_FIELDS}
        return {
            **columns,
            "until": None if self.until is None else self.until.isoformat(),
            "outside": [dict(process) for process in self.outside],
            "seen_at": self.seen_at.isoformat(),
            "open": self.card.open,
            "jobs": [
                {"job_id": j.job_id, "user": j.user, "reserved": j.reserved, "cards": list(self.cards_of(j.job_id))}
                for j in self.card.running
            ],
            "drained": None if self.closed_by is None else self.closed_by.as_json(),
            "failures": dict(self.failures),
        }


DEVICE_FIELDS = tuple(DeviceState.__annotations__)[:-5]
"""The columns of a node, and `reserved`. `free` is as of now."""


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
        return frozenset(name for device in self.devices for name in (device.node, device.host))

    def jobs_on(self, target: str) -> list[int]:
        """The jobs that run on a box or a card, by number."""
        devices = [device for device in self.devices if target in (device.node, device.host)]
        return sorted({job.job_id for device in devices for job in device.card.running})


def fleet(store: Store) -> Fleet:
    """Every device that a worker has reported, unless its row was removed."""
    return fleet_of(store.cards.fleet())


def fleet_of(view: FleetView) -> Fleet:
    """The devices of a view."""
    devices = tuple(_device(view.nodes[name], card, view) for name, card in view.cards.items())
    return Fleet(devices=devices, now=view.now, round_at=view.round_at)


def _device(node: Node, card: Card, view: FleetView) -> DeviceState:
    more = {"fault": node.fault, "free": card.free, "outside": tuple(node.outside)}
    more["reserved"] = sum(job.reserved for job in card.running)
    silent_s = (view.now - node.seen_at).total_seconds()
    return DeviceState(
        **more | {name: getattr(node, name) for name in DEVICE_FIELDS if name not in more},
        card=card,
        closed_by=_closed_by(view.drain_of(node.node)),
        silent_s=silent_s if silent_s > SILENT_S else None,
        failures=Counter(failure.reason.value for failure in view.failures if failure.node == node.node),
        spread={job.job_id: names for job in card.running if len(names := tuple(view.cards_of(job.job_id))) > 1},
    )


def _closed_by(order: DrainOrder | None) -> ClosedBy | None:
    return None if order is None else ClosedBy(user=order.user, reason=order.reason, until=order.until)
