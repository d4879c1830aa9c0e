"""A device's row in the database, as its node writes it."""

from __future__ import annotations

import datetime as dt

from loractl.common.placement.cards import Card
from loractl.common.store.records import Arrival, BoxIdentity, NodeState
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import Watch
from loractl.worker.protocol.idle_trainer import by_mark
from loractl.worker.protocol.versions import installed_versions

from .options import NodeOptions


class DeviceRow:
    """The node's account of its device: what it is, what holds it now, what its owner allows.

    `box` tells it from another one with its name.
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
            outside_bytes=seen.outside or 0,  # the first look was before any job came
            outside=seen.others,
            used=by_mark(seen.used),
            margin=self._options.margin,
            max_jobs=self._max_jobs,
            user_limit=self._options.user_limit,
            labels=self._options.labels,
            load=seen.load,
            temperature=seen.temperature,
            draining=draining,
            gangs=device.kind != "cpu",
            fault=seen.fault,
            self_test=seen.self_test,
            versions=self._versions,
            until=None if self._options.until is None else dt.datetime.fromtimestamp(self._options.until, dt.UTC),
            window_s=self._options.window_s,
            **vars(self._box),
        )
