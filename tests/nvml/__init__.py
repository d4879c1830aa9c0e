"""A stand-in for NVML, compiled on the spot: the real nvidia-ml-py reports the cards that a test writes down."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class FakeCard:
    """What the driver shows of one card. MiB."""

    uuid: str
    total: int
    held: int = 0  # by the driver itself
    load: int = 0
    temperature: int = 30
    name: str = "NVIDIA Stand-in"
    processes: tuple[tuple[int, int | None], ...] | None = ()  # pid, MiB; None: the driver does not tell
    mode: int = 0  # of computing: 2 prohibited, 3 exclusive process
    lost: bool = False  # it has fallen off the bus
    slices: tuple[FakeCard, ...] | None = None  # None: it is not in MIG mode

    def lines(self, kind: str = "card") -> list[str]:
        first = f"{kind} {self.uuid} {self.total} {self.held} {self.load} {self.temperature} {self.name}"
        processes = [f"process {pid} {'-' if mib is None else mib}" for pid, mib in self.processes or ()]
        more = ["unlisted"] * (self.processes is None) + ["lost"] * self.lost + ["mig"] * (self.slices is not None)
        slices = [line for part in self.slices or () for line in part.lines("slice")]
        return [first, f"mode {self.mode}", *processes, *more, *slices]


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A compiled library and the file that it reads."""

    folder: Path  # of libnvidia-ml.so.1
    file: Path

    def show(self, *cards: FakeCard, init: int = 0) -> None:
        """From now on these are the box's cards. `init`: the result code of nvmlInit, 18 where the versions differ."""
        text = "\n".join([f"init {init}", *(line for card in cards for line in card.lines())]) + "\n"
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)  # never half a file for who reads it now

    def environment(self) -> dict[str, str]:
        """Under which a process meets this library instead of the driver's."""
        inherited = os.environ.get("LD_LIBRARY_PATH")
        folders = f"{self.folder}:{inherited}" if inherited else str(self.folder)
        return {"LD_LIBRARY_PATH": folders, "NVML_STANDIN": str(self.file)}


def compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path, *, old: bool = False) -> StandIn:
    """Compile the stand-in into `folder`. `old`: as a driver before 510 has it, without the newer list of processes."""
    command = compiler()
    assert command is not None
    source, library = Path(__file__).with_name("nvml.c"), folder / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", *["-DOLD"] * old]
    subprocess.run([command, *options, "-o", library, source], check=True)
    return StandIn(folder=folder, file=folder / "cards.txt")
