"""What a training leaves in its process: threads, files, children, tensors. A host stays only if nothing is left."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from loractl.worker.protocol.messages import Start

TENSORS_LEFT = 1 << 20
"""Bytes of tensors that libraries may keep for themselves: tables of positions, of code words."""

CARD_LEFT = 64 << 20
"""Bytes that torch's allocator may hold beyond the base: cuBLAS takes its workspaces from it."""

JOIN_S = 2.0
"""Seconds within which a training's thread ends once it has nothing more to do."""


@dataclass(frozen=True, kw_only=True)
class ProcessBaseline:
    """A process before a training: what exists then is not the training's."""

    threads: frozenset[int] = field(default_factory=lambda: frozenset(t.ident or 0 for t in threading.enumerate()))
    children: frozenset[int] = field(default_factory=lambda: frozenset(_children()))
    files: frozenset[str] = field(default_factory=lambda: frozenset(open_files()))
    tensors: tuple[weakref.ref[torch.Tensor], ...] = field(
        default_factory=lambda: tuple(map(weakref.ref, _living_tensors()))
    )
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)

    def restore(self) -> None:
        """Restore the environment and the working directory."""
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)

    def left(self, kept: Collection[torch.Tensor]) -> str | None:
        """What is left of a training, in words; None: nothing but the tensors that are kept."""
        here = self.threads | {threading.get_ident()}
        threads = [t for t in threading.enumerate() if t.ident not in here and not _is_foreign(t)]
        for thread in threads:
            thread.join(timeout=JOIN_S)
        if alive := [thread.name for thread in threads if thread.is_alive()]:
            return f"the thread {alive[0]} still runs"
        if children := sorted(set(_children()) - self.children):
            return f"process {children[0]} still runs"
        if files := sorted(set(open_files()) - self.files):
            return f"{files[0]} is still open"
        gc.collect()
        size = self._tensors_left(kept)
        if size > TENSORS_LEFT:
            return f"{size / 2**20:.1f} MiB of tensors are still there"
        return _left_on_card(kept)

    def _tensors_left(self, kept: Collection[torch.Tensor]) -> int:
        """Bytes in storages that do not belong to the base and were not there before."""
        mine = {tensor.untyped_storage().data_ptr() for tensor in kept}
        before = {id(tensor) for ref in self.tensors if (tensor := ref()) is not None}
        found: dict[int, int] = {}
        for tensor in _living_tensors():
            if id(tensor) in before or tensor.layout is not torch.strided or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in mine:
                found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())


def _is_foreign(thread: threading.Thread) -> bool:
    """Whether a library started it, as autograd starts one for a card, and Python has run in it since: nobody can join
    it, and threading considers it alive even after its end."""
    return isinstance(thread, threading._DummyThread)


def _left_on_card(kept: Collection[torch.Tensor]) -> str | None:
    if not torch.cuda.is_initialized():
        return None
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.is_cuda}
    left = torch.cuda.memory_allocated() - sum(storages.values())
    return f"{left / 2**20:.1f} MiB of the card are still held" if left > CARD_LEFT else None


def _living_tensors() -> list[torch.Tensor]:
    # type() and not isinstance: some libraries' objects import something on every question about their class
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


NO_DISK = ("/dev/", "/proc/", "/sys/", "/memfd:")
"""Prefixes of names that are on no disk: CUDA's driver holds such files from its context on, which comes with the first
training."""


def open_files() -> list[str]:
    """Files on a disk that this process has open, by name."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:  # the descriptor that lists them
            continue
        if target.startswith("/") and not target.startswith(NO_DISK):
            found.append(target)
    return found


def _children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


LOOK_S = 0.02
"""Seconds between two looks at tensors: a step of the other trainings that began with this one may hold them to its
end."""


@dataclass(kw_only=True)
class TrainingRemains:
    """Note what a training creates; after its end, see what is left of that.

    Tables that libraries create while others train can be told apart only when all trainings are gone
    (`ProcessBaseline`).
    """

    order: Start
    _tensors: list[weakref.ref[Any]] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def note(self, tensors: Iterable[Any]) -> None:
        """These are the training's own."""
        self._tensors += map(weakref.ref, tensors)

    def note_thread(self, thread: threading.Thread) -> None:
        self._threads.append(thread)

    def left(self) -> str | None:
        """What is left, in words."""
        for thread in self._threads:
            thread.join(timeout=JOIN_S)
            if thread.is_alive():
                return f"the thread {thread.name} still runs"
        gc.collect()  # a mapped file stays open as long as an error's reference cycle holds it
        own = tuple(str(Path(folder).parent) + "/" for folder in (self.order.output_dir, self.order.checkpoint_dir))
        if files := sorted(name for name in open_files() if name.startswith(own)):
            return f"{files[0]} is still open"
        deadline = time.monotonic() + JOIN_S
        while (size := self._held()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return f"{size / 2**20:.1f} MiB of its tensors are still there" if size else None

    def _held(self) -> int:
        """Bytes of its live tensors."""
        gc.collect()
        return sum(one.untyped_storage().nbytes() for ref in self._tensors if (one := ref()) is not None)
