"""What a training leaves in its process: threads, files, children, tensors, and settings of torch and of the system. A
host stays only if nothing is left.

The environment, the working directory and what is attached to the base are restored instead.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from loractl.worker.protocol.messages import Start

_CODE = (types.FunctionType, types.BuiltinFunctionType, type, staticmethod, classmethod, property)

_MODULES = (
    "torch", "torch.nn.functional", "torch.nn.init", "torch.nn.modules.module", "torch.optim.optimizer",
    "torch.autograd.function", "torch.utils.checkpoint", "peft.tuners.lora.layer", "random",
)  # fmt: skip
"""Modules whose functions and classes every training calls, apart from those of the base's own classes and of
loractl."""

_OF_TORCH: dict[str, Callable[[], Any]] = {
    "the default dtype": torch.get_default_dtype,
    "the default device": lambda: str(torch.get_default_device()),
    "the deterministic algorithms": lambda: (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    ),
    "the precision of matrix products": torch.get_float32_matmul_precision,
    "the reduced precision of CUDA's products": lambda: _values(
        torch.backends.cuda.matmul, "allow_tf32", "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    ),
    "a switch of cuDNN": lambda: _values(
        torch.backends.cudnn, "enabled", "benchmark", "deterministic", "allow_tf32"
    ),
    "oneDNN": lambda: _values(torch.backends.mkldnn, "enabled", "deterministic", "allow_tf32"),
    "the attention back ends": lambda: (
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    ),
    "the recording of gradients": lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    "autocasting": lambda: tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
    ),
    "the search for anomalies": torch.is_anomaly_enabled,
    "the number of torch's threads": torch.get_num_threads,
    "a mode of torch's functions": lambda: (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
    "a hook of all modules": lambda: tuple(
        len(hooks) for name, hooks in sorted(vars(torch.nn.modules.module).items())
        if name.startswith("_global_") and hasattr(hooks, "__len__")
    ),
}  # fmt: skip

_OF_THE_SYSTEM: dict[str, Callable[[], Any]] = {
    "the umask": lambda: _umask(),
    "a limit of the process": lambda: {
        name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")
    },
    "a signal's handler": lambda: {number: signal.getsignal(number) for number in signal.valid_signals()},
    "the priority": lambda: os.getpriority(os.PRIO_PROCESS, 0),
    "the limit of recursion": sys.getrecursionlimit,
    "the tracing of Python": lambda: (sys.gettrace(), sys.getprofile()),
    "the module path": lambda: tuple(sys.path),
}


class Switches:
    """The switches of a process now. Take it before a training, in the thread that compares."""

    def __init__(self) -> None:
        self._values = {name: ask() for name, ask in {**_OF_TORCH, **_OF_THE_SYSTEM}.items()}

    def changed(self) -> str | None:
        """What has changed, in words; None: nothing."""
        for name, ask in {**_OF_TORCH, **_OF_THE_SYSTEM}.items():
            if ask() != self._values[name]:
                return f"{name} is not as it was"
        return None


class Code:
    """The functions and classes that trainings on a base call. Take it when the base was just loaded."""

    def __init__(self, model: Any) -> None:
        self._owners = {**_modules(), **_classes(model)}
        self._before = {owner: _code_of(vars(thing)) for owner, thing in self._owners.items()}

    def changed(self) -> str | None:
        """Which of them has been replaced, in words; None: none. Later additions do not count."""
        for owner, thing in self._owners.items():
            now = vars(thing)
            for name, before in self._before[owner].items():
                if now.get(name) is not before:
                    return f"{owner}.{name} is not as it was"
        return None


def _modules() -> dict[str, Any]:
    found = {name: module for name, module in list(sys.modules.items()) if name.startswith("loractl.worker.")}
    return {**found, **{name: sys.modules[name] for name in _MODULES if name in sys.modules}}


def _classes(model: Any) -> dict[str, Any]:
    """The classes of the base's modules and their ancestors, tensors and parameters, and the modules they are from."""
    kinds = {type(module) for module in model.modules()} | {torch.Tensor, torch.nn.Parameter, torch.optim.Optimizer}
    every = {one for kind in kinds for one in kind.__mro__ if one.__module__ != "builtins"}
    owners: dict[str, Any] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in every}
    return {**owners, **{kind.__module__: sys.modules[kind.__module__] for kind in kinds}}


def _code_of(names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in list(names.items()) if isinstance(value, _CODE)}


def _values(owner: Any, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(owner, name, None) for name in names)


def _umask() -> str:
    """As /proc reports it: the system call that asks also sets it."""
    lines: Iterator[str] = iter(())
    with contextlib.suppress(OSError):
        lines = iter(Path("/proc/self/status").read_text().splitlines())
    return next((line for line in lines if line.startswith("Umask:")), "")


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
