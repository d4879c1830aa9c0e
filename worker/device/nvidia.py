"""NVIDIA cards and their MIG slices, as NVML shows them.

A card that can't be read or can't run a job is a card with a fault: no NVML error leaves this module, so that one lost
card does not end another card's node, and a driver that does not answer does not turn a GPU box into one without GPUs.
Cards are handed out by UUID. NVML counts in the order of the PCI bus, as nvidia-smi does; CUDA counts the fastest
first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pynvml

from .snapshot import Process, Snapshot

Answer = TypeVar("Answer")

KERNEL_LIST = Path("/proc/driver/nvidia/gpus")
"""The kernel module's own list of cards, one folder each: it exists even while NVML refuses to start."""


@dataclass(frozen=True, kw_only=True)
class NvmlDevice:
    """An NVIDIA card or a MIG slice of one."""

    index: int  # of the card, in the order of the PCI bus
    part: int | None = None  # of a card in MIG mode: the slice's index
    uuid: str
    name: str
    kind: Literal["nvml", "sim"] = "nvml"  # sim: only for placement, its memory is not measured
    trains_on: Literal["cuda", "cpu"] = "cuda"
    total: int  # bytes; 0: it could not be read
    unread: str | None = None  # why it could not be read at detection, with the next step

    @property
    def number(self) -> str:
        """Its number on the box, like 0, or 0.1 for a slice."""
        return str(self.index) if self.part is None else f"{self.index}.{self.part}"

    def look(self) -> Snapshot:
        """The card's state now. NVML is restarted for a card that fails: it does not forget a lost card by itself."""
        if self.unread is not None:
            return Snapshot(free=0, fault=self.unread)
        try:
            return self._look()
        except pynvml.NVMLError:
            pass  # ask again at once, with an NVML that knows what has changed
        try:
            _start_nvml()
            return self._look()
        except pynvml.NVMLError as error:
            return Snapshot(free=0, fault=in_words(error))

    def environment(self) -> dict[str, str]:
        """Environment variables that show a trainer only this device."""
        return {"CUDA_VISIBLE_DEVICES": self.uuid if self.trains_on == "cuda" else ""}

    def _look(self) -> Snapshot:
        handle = _handle(self.uuid)
        whole = handle if self.part is None else pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        return Snapshot(
            free=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            load=_optional(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            temperature=_optional(lambda: int(pynvml.nvmlDeviceGetTemperature(whole, pynvml.NVML_TEMPERATURE_GPU))),
            processes=_optional(lambda: _processes(handle)),
            fault=_closed_to_jobs(_optional(lambda: int(pynvml.nvmlDeviceGetComputeMode(whole))), self.uuid),
        )


def nvidia_cards(*, on_cpu: bool = False) -> list[NvmlDevice]:
    """Every card and slice of this box, including unreadable ones; none only without NVML's library or a driver."""
    try:
        _start_nvml()
        cards = [card for index in range(pynvml.nvmlDeviceGetCount()) for card in _parts(index)]
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    except pynvml.NVMLError as error:
        cards = [unread_card(index, in_words(error)) for index in range(_count_of_kernel())]
    return [replace(card, kind="sim", trains_on="cpu") if on_cpu else card for card in cards]


def unread_card(index: int, why: str, part: int | None = None) -> NvmlDevice:
    """A present or former card about which nothing can be read."""
    name = "NVIDIA card that can't be read"
    return NvmlDevice(index=index, part=part, uuid=f"unread-{index}", name=name, total=0, unread=why)


def missing_card(number: str) -> NvmlDevice:
    """A card that the box had when its worker started, but no longer has."""
    index, _, part = number.partition(".")
    why = "the driver no longer shows it: look at nvidia-smi and dmesg, then reset it or reboot the box"
    return unread_card(int(index), why, int(part) if part else None)


def in_words(error: BaseException) -> str:
    """What is wrong with a card, or with the driver, and what to do."""
    known = {
        pynvml.NVMLError_GpuIsLost: "the driver has lost it: look for Xid in dmesg, then reset it or reboot the box",
        pynvml.NVMLError_ResetRequired: "it must be reset: nvidia-smi --gpu-reset, or reboot the box",
        pynvml.NVMLError_LibRmVersionMismatch: "NVIDIA's library and kernel driver have different versions: reboot the"
        " box",
        pynvml.NVMLError_NotFound: "the driver no longer shows it: look at nvidia-smi and dmesg, then reset it or"
        " reboot the box",
        pynvml.NVMLError_DriverNotLoaded: "the driver is not loaded: modprobe nvidia, or reboot the box",
        pynvml.NVMLError_NoPermission: "the worker's user may not ask the driver: look at the rights of /dev/nvidia*",
    }
    said = next((text for kind, text in known.items() if isinstance(error, kind)), None)
    return said or f"NVML says: {error}; look at nvidia-smi"


def _start_nvml() -> None:
    """Restart NVML: what it knew about the cards may have changed."""
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()
    pynvml.nvmlInit()


def _count_of_kernel() -> int:
    """How many cards the kernel module has; at least one, since there is a driver."""
    try:
        return max(1, sum(1 for _ in KERNEL_LIST.iterdir()))
    except OSError:
        return 1


def _parts(index: int) -> list[NvmlDevice]:
    """A card as one device, or its slices."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        mode = _optional(lambda: pynvml.nvmlDeviceGetMigMode(handle))
        if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return [_read(handle, index, None)]
        slices = [_read(part_handle, index, part) for part, part_handle in _slices(handle)]
    except pynvml.NVMLError as error:
        return [unread_card(index, in_words(error))]
    how = "nvidia-smi mig -cgi ... -C makes some, nvidia-smi -mig 0 ends the mode; then start the worker again"
    return slices or [unread_card(index, f"it is in MIG mode and has no slices: {how}")]


def _slices(handle: Any) -> Iterator[tuple[int, Any]]:
    for part in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
            yield part, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, part)


def _read(handle: Any, index: int, part: int | None) -> NvmlDevice:
    return NvmlDevice(
        index=index,
        part=part,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        total=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _handle(uuid: str) -> Any:
    """The handle of a card or slice, even if another card is lost: NVML then finds no card by UUID."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        for handle in _all_handles():
            with contextlib.suppress(pynvml.NVMLError):
                if pynvml.nvmlDeviceGetUUID(handle) == uuid:
                    return handle
        raise error from None


def _all_handles() -> Iterator[Any]:
    for index in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            yield handle
            yield from (part_handle for _, part_handle in _slices(handle))


def _closed_to_jobs(mode: int | None, uuid: str) -> str | None:
    """Why a card in this compute mode can't have jobs."""
    if mode in (None, pynvml.NVML_COMPUTEMODE_DEFAULT):
        return None
    what = "PROHIBITED" if mode == pynvml.NVML_COMPUTEMODE_PROHIBITED else "EXCLUSIVE_PROCESS"
    return f"its compute mode is {what}, jobs share cards: nvidia-smi -i {uuid} -c DEFAULT"


def _processes(handle: Any) -> tuple[Process, ...]:
    running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return tuple(Process(pid=p.pid, bytes=p.usedGpuMemory) for p in running)


def _optional(query: Callable[[], Answer]) -> Answer | None:
    """None if a card does not answer a question: it is used anyway."""
    try:
        return query()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound):
        return None
    except pynvml.NVMLLibraryMismatchError:  # the same from an older driver, but no NVMLError
        return None
