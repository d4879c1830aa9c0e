"""What a training may switch in its process for the next one: settings of torch and of the system, and the code itself.
The environment, the working directory and what is attached to the base are restored instead."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

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
