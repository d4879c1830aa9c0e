"""The devices of this box: NVIDIA cards by NVML, the CPU with its RAM as memory, or a simulated inventory."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from loractl.common.errors import UsageError
from loractl.common.settings import Settings
from loractl.common.units import parse_size


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that holds memory of a device."""

    pid: int
    bytes: int | None  # None: the driver does not say


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a device shows at one moment."""

    free: int  # bytes
    load: int | None = None  # percent
    temperature: int | None = None  # °C
    processes: tuple[Process, ...] | None = None  # None: it does not tell


class Device(Protocol):
    """One device."""

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["nvml", "cpu", "sim"]: ...
    @property
    def trains_on(self) -> Literal["cuda", "cpu"]: ...
    @property
    def total(self) -> int:
        """Bytes."""
        ...

    def look(self) -> Snapshot:
        """The device's state now."""
        ...

    def environment(self) -> dict[str, str]:
        """Environment variables that show a trainer this device alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class CpuDevice:
    """The processor; its memory is the box's RAM, or the container's part of it."""

    index: int = 0
    uuid: str = "cpu"
    name: str = "CPU"
    kind: Literal["cpu"] = "cpu"
    trains_on: Literal["cpu"] = "cpu"
    total: int

    def look(self) -> Snapshot:
        import psutil

        free = psutil.virtual_memory().available
        limit, used = _cgroup("memory.max"), _cgroup("memory.current")
        if limit is not None and used is not None:
            free = min(free, limit - used + _reclaimable())
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

    def look(self) -> Snapshot:
        return Snapshot(free=self.total)

    def environment(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, kw_only=True)
class NvmlDevice:
    """An NVIDIA card, always named by its UUID: indexes change with CUDA_DEVICE_ORDER and reboots."""

    index: int
    uuid: str
    name: str
    kind: Literal["nvml", "sim"] = "nvml"  # sim: for placement alone, its memory is not measured
    trains_on: Literal["cuda", "cpu"] = "cuda"
    total: int

    def look(self) -> Snapshot:
        import pynvml

        handle = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return Snapshot(
            free=int(memory.free),
            load=_optional(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            temperature=_optional(lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
            processes=_optional(lambda: _processes(handle)),
        )

    def environment(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self.uuid if self.trains_on == "cuda" else ""}


def find_devices(settings: Settings, only: str | None = None) -> list[Device]:
    """The devices that LORACTL_DEVICES names, else NVML's, else the CPU.

    cpu, nvml, sim:8GiB,24GiB (cards that exist for placement alone; training runs on the CPU), or nvml:cpu (NVML's
    cards for placement, training on the CPU: for trying out). `only`: indexes or UUIDs, like "0,2".
    Raises UsageError when it can't be understood, or names cards that are not there.
    """
    wanted = settings.devices or "auto"
    if wanted.startswith("sim:"):
        return _chosen(_simulated(wanted.removeprefix("sim:")), only)
    if wanted not in ("auto", "cpu", "nvml", "nvml:cpu"):
        raise UsageError(f"LORACTL_DEVICES={wanted} is not known", "use cpu, nvml, or sim:8GiB,24GiB")
    cards = [] if wanted == "cpu" else _nvml_cards(on_cpu=wanted == "nvml:cpu")
    if cards:
        return _chosen(list(cards), only)
    if wanted.startswith("nvml"):
        raise UsageError("NVML finds no NVIDIA card on this box", "check nvidia-smi, or set LORACTL_DEVICES=cpu")
    return _chosen([_cpu()], only)


def _chosen(devices: list[Device], only: str | None) -> list[Device]:
    """The devices that a person named by index or by the beginning of a UUID."""
    if only is None:
        return devices
    chosen: list[Device] = []
    for name in (part.strip() for part in only.split(",")):
        matching = [d for d in devices if name and (str(d.index) == name or d.uuid.startswith(name))]
        if len(matching) != 1:
            there = ", ".join(f"{d.index} ({d.uuid})" for d in devices)
            raise UsageError(
                f"--gpus: {name!r} is {'not one' if matching else 'no'} card of this box", f"it has {there}"
            )
        chosen += [d for d in matching if d not in chosen]
    return chosen


def _cpu() -> CpuDevice:
    import psutil

    total = psutil.virtual_memory().total
    limit = _cgroup("memory.max")
    return CpuDevice(name=f"CPU, {os.cpu_count()} cores", total=total if limit is None else min(total, limit))


def _simulated(sizes: str) -> list[Device]:
    devices: list[Device] = []
    for index, size in enumerate(sizes.split(",")):
        try:
            total = parse_size(size)
        except ValueError as error:
            raise UsageError(f"LORACTL_DEVICES: {size!r} {error}", "like sim:8GiB,24GiB") from None
        devices.append(SimulatedDevice(index=index, uuid=f"SIM-{index}", name=f"simulated {size.strip()}", total=total))
    return devices


def _nvml_cards(*, on_cpu: bool) -> list[NvmlDevice]:
    """Every card that NVML shows and CUDA_VISIBLE_DEVICES allows; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # no driver, no library: this box has no NVIDIA card
    cards = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        card = NvmlDevice(index=index, uuid=uuid, name=pynvml.nvmlDeviceGetName(handle), total=total)
        cards.append(replace(card, kind="sim", trains_on="cpu") if on_cpu else card)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return cards
    allowed = [v.strip() for v in visible.split(",") if v.strip()]
    return [c for c in cards if str(c.index) in allowed or any(a and c.uuid.startswith(a) for a in allowed)]


def _processes(handle: Any) -> tuple[Process, ...]:
    import pynvml

    running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return tuple(Process(pid=p.pid, bytes=p.usedGpuMemory) for p in running)


def _optional(query: Any) -> Any:
    """None where a card does not answer a question: the card is used all the same."""
    import pynvml

    try:
        return query()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound):
        return None


def _reclaimable() -> int:
    """Bytes of cached files that the kernel gives back when asked; memory.current counts them as used."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _cgroup(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
