"""A device's row in the database, as its node writes it, with the options of the box's owner."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field

from loractl.common.placement.cards import MARGIN_BYTES, Card
from loractl.common.store.records import Arrival, BoxIdentity, NodeState
from loractl.worker.allowance import shows_bf16
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import HIGH_WATER_S, Watch
from loractl.worker.protocol.versions import installed_versions


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """The options of `loractl worker`, as its nodes get them."""

    margin: int = MARGIN_BYTES  # bytes that stay free
    max_jobs: int | None = None  # None: by the card's size
    user_limit: int | None = None  # running jobs that one user may have in the fleet
    keeps_jobs: bool = False  # its jobs yield to no shorter ones
    labels: dict[str, str] = field(default_factory=dict)
    high_water_s: float = HIGH_WATER_S  # how long other people's programs keep the most memory that they held
    fork_server: bool = True  # whether trainers are forks of a process that has done the imports
    until: float | None = None  # when the worker stops by itself, by the database's clock, in seconds since 1970
    window_s: float | None = None  # from its start until then
    grace_s: float | None = None  # how long a stop may take; None: no limit
    devices: int = 1  # the number that share the box's cores
    store_mark: str | None = None  # the mark of the lab's artifact store; see ArtifactStore


class DeviceRow:
    """What the node reports of its device: what it is, what is on it now, what its owner allows.

    `box` distinguishes this box from another one with the same name.
    """

    def __init__(
        self, place: Workplace, watch: Watch, options: NodeOptions, *, max_jobs: int, box: BoxIdentity
    ) -> None:
        self._place = place
        self._watch = watch
        self._options = options
        self._max_jobs = max_jobs
        self._box = box
        self._versions = installed_versions()
        self._processor = {"bf16": shows_bf16()} if place.device.kind == "cpu" else None  # it needs no test

    def arrive(self) -> Arrival:
        """Write the row of a node that is about to serve, unless another one has its name. Raises NameTaken."""
        return self._place.store.cards.arrive(self._state(draining=False))

    def write(self, *, draining: bool) -> Card:
        """Look at the device and write its row; returns the card with what runs on it. Raises NameTaken."""
        return self._place.store.cards.see(self._state(draining=draining))

    def _state(self, *, draining: bool) -> NodeState:
        place, device = self._place, self._place.device
        seen = self._watch.look()
        return NodeState(
            node=place.node,
            host=place.settings.host,
            gpu=device.uuid,
            device_name=device.name,
            kind=device.kind,
            total=device.total,
            outside_bytes=seen.outside or 0,  # never unknown: the first look comes before any job
            outside=seen.others,
            used=seen.used,
            margin=self._options.margin,
            max_jobs=self._max_jobs,
            user_limit=self._options.user_limit,
            keeps_jobs=self._options.keeps_jobs,
            labels=self._options.labels,
            load=seen.load,
            temperature=seen.temperature,
            draining=draining,
            gangs=device.kind != "cpu",
            fault=seen.fault or place.artifacts.fault,
            self_test=self._processor or seen.self_test,
            versions=self._versions,
            until=None if self._options.until is None else dt.datetime.fromtimestamp(self._options.until, dt.UTC),
            window_s=self._options.window_s,
            **vars(self._box),
        )
