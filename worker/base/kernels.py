"""bitsandbytes, loaded without torch's compiler."""

from __future__ import annotations

from typing import Any


def load_kernels() -> None:
    """Import bitsandbytes; call it before peft, which does the same. It asks for the device's capability.

    It hands five functions to torch.compile, for devices that it has no kernels for. None of them is compiled, but for
    that torch loads its compiler: a tenth of what a trainer's start takes. Here they stay as they are written.
    """
    import torch

    compiler = torch.compile
    torch.compile = _as_written
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler


def _as_written(function: Any = None, **_: Any) -> Any:
    """In torch.compile's place: as a call, or as a decorator with options."""
    return function if function is not None else _as_written
