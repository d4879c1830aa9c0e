"""The devices of this box: NVIDIA cards by NVML, the CPU with its RAM as memory, or a simulated inventory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loractl.common.errors import UsageError
from loractl.common.settings import Settings
from loractl.common.units import parse_size
from loractl.worker.allowance import allowed_cores, allowed_memory, machine_cores, memory_room

from .nvidia import NvmlDevice, missing_card, nvidia_cards
from .snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class CpuDevice:
    """The CPU; its memory is the box's RAM, or the container's part of it."""

    uuid: str = "cpu"
    kind: Literal["cpu"] = "cpu"
    trains_on: Literal["cpu"] = "cpu"
    total: int

    @property
    def number(self) -> str:
        return "0"

    @property
    def name(self) -> str:
        """It includes the number of usable cores: a CPU with fewer of them has another speed."""
        cores, every = allowed_cores(), machine_cores()
        return f"CPU, {cores} of {every} cores" if cores < every else f"CPU, {every} cores"

    def look(self) -> Snapshot:
        import psutil

        free = min(psutil.virtual_memory().available, self.total)
        if (room := memory_room()) is not None:
            free = min(free, room)
        return Snapshot(free=max(0, free), load=round(psutil.cpu_percent()))

    def environment(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, kw_only=True)
class SimulatedDevice:
    """A card that only exists for placement; training runs on the CPU."""

    index: int
    uuid: str
    name: str
    kind: Literal["sim"] = "sim"
    trains_on: Literal["cpu"] = "cpu"
    total: int

    @property
    def number(self) -> str:
        return str(self.index)

    def look(self) -> Snapshot:
        return Snapshot(free=self.total)

    def environment(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ""}


Device = CpuDevice | SimulatedDevice | NvmlDevice
"""`look` shows its state now; `environment` has variables that show a trainer only this device."""


def find_devices(settings: Settings, only: str | None = None) -> list[Device]:
    """The devices that LORACTL_DEVICES names, else the NVIDIA cards, else the CPU.

    cpu, nvml, sim:8GiB,24GiB (cards that only exist for placement; training runs on the CPU), or nvml:cpu (NVML's cards
    for placement, training on the CPU: for trying out). Only NVIDIA cards that CUDA_VISIBLE_DEVICES shows. `only`:
    numbers or UUIDs, like "0,2". Raises UsageError if it can't be parsed, or names a device that does not exist.
    """
    wanted, devices = _all_devices(settings)
    if wanted.startswith("nvml") and not devices:
        raise UsageError("NVML finds no NVIDIA card on this box", "check nvidia-smi, or set LORACTL_DEVICES=cpu")
    if not wanted.startswith("sim:") and any(isinstance(device, NvmlDevice) for device in devices):
        visible = _visible(devices)
        if not visible and wanted.startswith("nvml"):
            raise UsageError("CUDA_VISIBLE_DEVICES shows no NVIDIA card of this box", "unset it, or name cards by UUID")
        devices = visible or [_cpu()]
    return _chosen(devices, only.split(","), "--gpus") if only is not None else devices


def find_device(settings: Settings, number: str) -> Device:
    """The device with this number; an NVIDIA card that is gone is returned with that as its fault.

    For a node: its worker chose the cards when it started.
    """
    _, devices = _all_devices(settings)
    return next((device for device in devices if device.number == number), None) or missing_card(number)


KERNELS_KEPT = "128"
"""Kernels that oneDNN keeps once it has compiled them for their shapes: with 1,024, its own number, a training with a
different number of tokens at each step held 200 MiB more after 40 steps. 128 take no more time than that, 32 take 6 %
more (SmolLM2-135M, bf16 on an AMD CPU with AVX512_BF16)."""


def torch_settings(device: Device, set_already: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that make torch fit a device better; what the box's owner has set stays."""
    if device.trains_on != "cuda":
        wanted = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": KERNELS_KEPT}
        return {name: value for name, value in wanted.items() if name not in set_already}
    # On Hopper and Blackwell torch 2.13 takes cuDNN's attention first, which makes a plan for each new length: a
    # training's rows have no padding, and an answer's length changes with each token. Flash attention needs no plan.
    wanted = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    if "PYTORCH_CUDA_ALLOC_CONF" not in set_already:
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # blocks grow in place, so fewer become unusable
    return {name: value for name, value in wanted.items() if name not in set_already}


def order_of_numbers() -> str | None:
    """How the numbers in CUDA_VISIBLE_DEVICES are counted; None if it has none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not any(name.strip().isdigit() for name in visible.split(",")):
        return None
    return f"CUDA_VISIBLE_DEVICES={visible} is read as nvidia-smi counts, in PCI order; UUIDs are safer."


def _all_devices(settings: Settings) -> tuple[str, list[Device]]:
    """What is wanted, and all devices of that kind; the CPU if anything will do and there is no NVIDIA card."""
    wanted = settings.devices or "auto"
    if wanted.startswith("sim:"):
        return wanted, _simulated(wanted.removeprefix("sim:"))
    if wanted not in ("auto", "cpu", "nvml", "nvml:cpu"):
        raise UsageError(f"LORACTL_DEVICES={wanted} is not known", "use cpu, nvml, or sim:8GiB,24GiB")
    cards: list[Device] = [] if wanted == "cpu" else list(nvidia_cards(on_cpu=wanted == "nvml:cpu"))
    return wanted, cards if cards or wanted.startswith("nvml") else [_cpu()]


def _visible(cards: list[Device]) -> list[Device]:
    """The cards that CUDA_VISIBLE_DEVICES shows, all without it.

    Its numbers count in PCI order: NVML does not know which card CUDA considers the fastest.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in (value or "").split(",") if name.strip()]
    if value is None:
        return cards
    if not names or names[0] in ("-1", "NoDevFiles"):
        return []  # CUDA's own ways to say none
    if any(name.isdigit() for name in names) and os.environ.get("CUDA_DEVICE_ORDER") == "FASTEST_FIRST":
        uuids = ",".join(card.uuid for card in cards)
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES={value} counts the fastest card first (CUDA_DEVICE_ORDER), which the driver's list"
            " does not say",
            f"name cards by UUID, like CUDA_VISIBLE_DEVICES={uuids}, or set CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    chosen = _chosen(cards, names, "CUDA_VISIBLE_DEVICES")
    return sorted(chosen, key=cards.index)


def _chosen(devices: list[Device], names: list[str], source: str) -> list[Device]:
    """The devices that a person named: by number, by the beginning of a UUID, all slices of a card by its number.

    An unknown UUID may belong to a card that can't be read.
    """
    chosen: list[Device] = []
    for name in (part.strip() for part in names):
        exact = [d for d in devices if name and (d.number == name or d.uuid.startswith(name))]
        matching = exact or [d for d in devices if name and d.number.startswith(f"{name}.")]
        if not matching and name.startswith(("GPU-", "MIG-")):
            matching = [d for d in devices if isinstance(d, NvmlDevice) and d.unread is not None]
        if len(exact) > 1 or not matching:
            there, how = ", ".join(f"{d.number} ({d.uuid})" for d in devices), "not one" if exact else "no"
            raise UsageError(f"{source}: {name!r} is {how} card of this box", f"it has {there}")
        chosen += [d for d in matching if d not in chosen]
    return chosen


def _cpu() -> CpuDevice:
    import psutil

    total = psutil.virtual_memory().total
    return CpuDevice(total=min(total, allowed_memory() or total))


def _simulated(sizes: str) -> list[Device]:
    devices: list[Device] = []
    for index, size in enumerate(sizes.split(",")):
        try:
            total = parse_size(size)
        except ValueError as error:
            raise UsageError(f"LORACTL_DEVICES: {size.strip()!r} {error}", "like sim:8GiB,24GiB") from None
        if not total:
            raise UsageError(f"LORACTL_DEVICES: a card of {size.strip()} holds nothing", "like sim:8GiB,24GiB")
        devices.append(SimulatedDevice(index=index, uuid=f"SIM-{index}", name=f"simulated {size.strip()}", total=total))
    return devices
