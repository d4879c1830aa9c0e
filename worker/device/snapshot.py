"""What a device shows at one moment: its memory, the processes on it, and what keeps it from working."""

from __future__ import annotations

from dataclasses import dataclass


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
    processes: tuple[Process, ...] | None = None  # None: unknown
    fault: str | None = None  # why nothing can run on it now, with the next step; the other fields then mean nothing
