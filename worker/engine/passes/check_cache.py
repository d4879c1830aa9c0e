"""Checks that passed on this box for concatenated rows: a new process need not repeat them.

An answer follows from the base's files, from how it is loaded and adapted, and from the code that computes. The name of
an empty file identifies all of these, so no file can be incomplete, and any change is checked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers

from loractl.worker.base import kernels

KEPT = 256
"""Answers kept: a few for each base on a box, and for each version of its packages."""


@dataclass(frozen=True, kw_only=True)
class CheckCache:
    """Runs a check unless it has passed on this box."""

    folder: Path
    about: Sequence[object]  # what the base is, and how it was loaded

    def __call__(self, question: str, check: Callable[[], str | None], /) -> str | None:
        """What is wrong; None: nothing, and that is remembered."""
        file = self.folder / self._name(question)
        if file.exists():
            with contextlib.suppress(OSError):  # a full disk
                file.touch()  # answers that nobody asks for are removed first
            return None
        if (wrong := check()) is None:
            _note(file)
        return wrong

    def decided(self, question: str, check: Callable[[], str | None], /) -> str | None:
        """Like a call, but a failure is remembered, too: it may have spoilt the process that ran the check."""
        failed = self.folder / f"{self._name(question)}.failed"
        with contextlib.suppress(OSError):
            if said := failed.read_text("utf-8"):
                failed.touch()
                return said
        if (wrong := self(question, check)) is not None:
            _note(failed, wrong)
        return wrong

    def _name(self, question: str) -> str:
        stack = [torch.__version__, transformers.__version__, peft.__version__, bitsandbytes.__version__]
        stack += [flash_attention(), _CODE]
        said = repr([question, *self.about, torch.backends.cpu.get_cpu_capability(), *stack])
        return hashlib.sha256(said.encode()).hexdigest()


def _note(file: Path, said: str = "") -> None:
    with contextlib.suppress(OSError):  # a full disk: it is checked again
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(said, "utf-8")
        for old in sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)


def flash_attention() -> str | None:
    """The version of flash-attn, if installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("flash-attn")
    return None


ROOMS = Path(__file__).parent, Path(kernels.__file__).parent
"""Where our own code is that loads a base, adapts it and runs it."""


def code_hash(*rooms: Path) -> str:
    """A hash of our own code in some folders."""
    content = b"".join(path.read_bytes() for room in rooms for path in sorted(room.glob("*.py")))
    return hashlib.sha256(content).hexdigest()


_CODE = code_hash(*ROOMS)
"""As of the import: an upgrade replaces the files while this process continues with the old code."""
