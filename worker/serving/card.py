"""The card of a serving process: the one with the most room, shared with the jobs by a reservation that is never
exceeded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loractl.common.errors import LoractlError
from loractl.common.memory.config import read_shape
from loractl.common.memory.context import CONTEXT_BYTES
from loractl.common.memory.plan import MIB, SEGMENT_BYTES, WORKSPACE_BYTES
from loractl.common.memory.weights import weight_bytes
from loractl.common.settings import Settings
from loractl.common.store.store import Store
from loractl.common.units import gib
from loractl.worker.allowance import threads_of_trainer
from loractl.worker.device.devices import Device, find_devices, torch_settings
from loractl.worker.device.occupancy import CardShare, reserve, unused_reservations

from .library import Arithmetic

LEAST_CACHE_BYTES = 512 * MIB
"""Keys and values of a few answers, and the prompts being read: serving needs at least this much."""

CACHE_SHARE = 0.6
"""Share of a card's free memory, after base and adapters, for keys and values if no size is asked for. The rest stays
for jobs."""

TRIES = 5
"""A job may start between the look at a card and the reservation; then look again."""

_held: list[CardShare] = []
"""They last as long as their files are open: until this process ends."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a serving process will hold of its card. Bytes."""

    base: int | None  # None: the model is unknown here, so all free memory is taken
    adapters: int
    cache: int | None  # None: from the free memory

    @classmethod
    def of(
        cls, base: tuple[str, str | None], arithmetic: Arithmetic, adapters: int, cache: int | None = None
    ) -> Footprint:
        """For a base, by its name and revision, in an arithmetic, with adapters of this size."""
        (model, revision), full = base, arithmetic.dtype == "float32"
        shape, weights, whole = read_shape(model, revision), None, arithmetic.exact or full
        if shape is not None:
            weights = weight_bytes(shape, arithmetic.method, full=full, whole_rest=whole)
        elif Path(model).is_dir():
            weights = sum(
                file.stat().st_size for file in Path(model).iterdir() if file.suffix in (".safetensors", ".gguf")
            )
        return cls(base=weights, adapters=adapters, cache=cache)

    @property
    def least(self) -> int:
        """What must be free."""
        fixed = (self.base or 0) + self.adapters + CONTEXT_BYTES + WORKSPACE_BYTES + SEGMENT_BYTES
        return fixed + (LEAST_CACHE_BYTES if self.cache is None else self.cache)

    def within(self, free: int) -> int:
        """What to reserve on a card with this much free."""
        if self.base is None:
            return free
        return self.least if self.cache is not None else self.least + int(CACHE_SHARE * (free - self.least))


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """A card, and what a process that is no job may take of it."""

    device: Device
    free: int  # bytes
    taken: int  # reserved for jobs, or used by them


def take_card(settings: Settings, store: Store, gpu: str | None, footprint: Footprint) -> str:
    """cuda or cpu. On a card this process has its reservation from here on, can't allocate beyond it, and sees no other
    card. Raises LoractlError if no card has room: jobs go first."""
    from loractl.worker.base.kernels import load_kernels
    from loractl.worker.base.quiet import quieten

    quieten()
    devices = find_devices(settings, gpu)
    cards = [device for device in devices if device.kind != "cpu"]
    faults = {device.number: device.look().fault for device in cards}
    working = [device for device in cards if faults[device.number] is None]
    if cards and not working:  # no base for GPUs is loaded on a CPU
        raise LoractlError(f"card {cards[0].number} can't be used: {faults[cards[0].number]}", "loractl gpus shows all")
    device, size = _reserved(settings, store, working, footprint) if cards else (devices[0], 0)
    os.environ["OMP_NUM_THREADS"] = str(threads_of_trainer(1))  # libgomp knows the affinity, but no quota
    os.environ.update({**torch_settings(device, os.environ), **device.environment()})
    if device.trains_on == "cuda":
        from loractl.worker.base.gauge import hold_to

        hold_to(size, "cuda", device.uuid)
    load_kernels()
    return device.trains_on


def _reserved(settings: Settings, store: Store, cards: Sequence[Device], footprint: Footprint) -> tuple[Device, int]:
    """The card with the most room, reserved, and the bytes. Raises LoractlError."""
    for _ in range(TRIES):
        best = max(_offers(settings, store, cards), key=lambda offer: offer.free)
        if footprint.least > best.free:
            where = f"card {best.device.number}" if len(cards) == 1 else f"the freest card ({best.device.number})"
            raise LoractlError(
                f"this takes {gib(footprint.least)} GiB, and {where} has {gib(best.free)} free next to its jobs",
                "wait for a job to end (loractl gpus), take another card (--gpu), or LORACTL_DEVICES=cpu",
            )
        try:
            reservation = reserve(settings.home, best.device.uuid, footprint.within(best.free))
        except OSError as error:
            what = f"{error.filename or settings.home}: {error.strerror}"
            raise LoractlError(f"a card can't be reserved: {what}", "check LORACTL_HOME") from error
        again = next(iter(_offers(settings, store, [best.device])))
        if again.taken <= best.taken:
            _held.append(reservation)
            return best.device, reservation.bytes
        reservation.close()  # a job started in between: it goes first
    raise LoractlError("jobs start on this box faster than a card can be taken", "try again")


def _offers(settings: Settings, store: Store, cards: Sequence[Device]) -> list[_Offer]:
    """What the ledger and the driver leave free on each card."""
    view = store.cards.fleet()
    known = {node.gpu: view.cards[node.node] for node in view.nodes.values() if node.host == settings.host}
    offers = []
    for device in cards:
        seen, card = device.look(), known.get(device.uuid)
        others = unused_reservations(settings.home, device.uuid, seen.processes, device.total - seen.free)
        free, taken = seen.free - others, 0
        if card is not None:
            # the node's view from a few seconds ago may lack a reservation, the driver's view lacks the jobs' unused
            # memory
            free, taken = min(free, card.free, card.usable - card.taken - others), card.taken
        offers.append(_Offer(device=device, free=max(0, free), taken=taken))
    return offers
