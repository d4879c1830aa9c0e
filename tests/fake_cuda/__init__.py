"""A CUDA card for a torch that was built without CUDA: the engine's own passes run on fake tensors that lie on it.

Shapes, types and devices of every operator are those of a card, and so are autocast, recomputation and autograd's
thread. Numbers, kernels and memory are not: a fake tensor has no content.

`python -m tests.fake_cuda CASE...` tries passes, in a process of its own: torch believes its first answer about cards.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
KEPT = Path(__file__).parents[2] / "build" / "fake_cuda"


def why_not() -> str | None:
    """Why there can be no such card here; None: there can."""
    spec = importlib.util.find_spec("torch")
    if (
        spec is not None
        and spec.origin is not None
        and (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()
    ):
        return "torch is built for CUDA here: pip install torch --index-url https://download.pytorch.org/whl/cpu"
    return None if compiler() is not None else "no C++ compiler, which the stand-in for a card needs"


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def put_in() -> None:
    """Let this process have the card. Call it before anything imports torch."""
    assert "torch" not in sys.modules, "torch has asked for cards already"
    ctypes.CDLL(str(_library()))


def _library() -> Path:
    """The compiled stand-in, from an earlier process where it was made of the same source for the same torch."""
    spec, command = importlib.util.find_spec("torch"), compiler()
    assert spec is not None and spec.origin is not None and command is not None
    torch = Path(spec.origin).parent
    made_of = (SOURCE.read_text(), importlib.metadata.version("torch"), str(torch), command)
    library = KEPT / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        made = Path(folder) / library.name
        options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
        linked = [f"-Wl,-rpath,{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([command, *options, SOURCE, "-o", made, *linked], check=True)
        os.replace(made, library)  # noqa: PTH105  never half a library for another process
    return library
