"""Knowledge: what a process found out about its base, once for all trainings that ask the same; and checks that passed
on this box, which a new process need not repeat.

A check's answer follows from the base's files, from how it is loaded and adapted, and from the code that computes. The
name of an empty file identifies all of these, so no file can be incomplete, and any change is checked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import bitsandbytes
import peft
import torch
import transformers

from loractl.worker.base import kernels

Found = TypeVar("Found")

KEPT = 8
"""Answers that stay: each job asks two questions, and the jobs of a sweep, or of one person, the same questions."""

LOOK_S = 0.5
"""How often a wait for another training's answer checks whether to stop."""


@dataclass(frozen=True)
class Known(Generic[Found]):
    """An answer, and the job that found it out."""

    answer: Found
    job_id: int


class Once(Protocol[Found]):
    """Finds something out about the base if no training of the process has. `keeps`: whether others may use it."""

    def __call__(
        self, question: str, find_out: Callable[[], Found], /, *, keeps: Callable[[Found], bool]
    ) -> Known[Found]: ...


class Knowledge:
    """Answers about one base, by what was asked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._found: OrderedDict[str, Known[Any]] = OrderedDict()
        self._sought: set[str] = set()

    def once(
        self,
        question: str,
        job_id: int,
        find_out: Callable[[], Found],
        *,
        check_stop: Callable[[], None],
        keeps: Callable[[Found], bool] = lambda found: True,
    ) -> Known[Found]:
        """The existing answer, or the one that another training is finding out; else what `find_out` returns or raises.

        `check_stop` is called while this training waits for another. If that fails, or its answer is only for itself
        (`keeps`), one of the waiting trainings finds out.
        """
        while True:
            with self._changed:
                if (known := self._known(question)) is not None:
                    return known
                if mine := question not in self._sought:
                    self._sought.add(question)
            if mine:
                return self._find(question, job_id, find_out, keeps)
            check_stop()
            with self._changed:
                self._changed.wait_for(lambda: question not in self._sought, LOOK_S)

    def _known(self, question: str) -> Known[Any] | None:
        if (known := self._found.get(question)) is not None:
            self._found.move_to_end(question)
        return known

    def _find(
        self, question: str, job_id: int, find_out: Callable[[], Found], keeps: Callable[[Found], bool]
    ) -> Known[Found]:
        try:
            finding = Known(find_out(), job_id)
            if not keeps(finding.answer):
                return finding
            with self._changed:
                self._found[question] = finding
                while len(self._found) > KEPT:
                    self._found.popitem(last=False)
            return finding
        finally:
            with self._changed:
                self._sought.discard(question)
                self._changed.notify_all()


CHECKS_KEPT = 256
"""Answers kept: a few for each base on a box, and for each version of its packages."""


@dataclass(frozen=True, kw_only=True)
class CheckCache:
    """Asks the process first (`once`), then the box, and runs the check if neither knows."""

    folder: Path
    about: Sequence[object]  # what the base is, and how it was loaded
    once: Once[str | None]

    def __call__(
        self, question: str, find_out: Callable[[], str | None], /, *, keeps: Callable[[str | None], bool]
    ) -> Known[str | None]:
        """What is wrong; None: nothing, and that is remembered."""

        def ask() -> str | None:
            file = self.folder / self._name(question)
            if file.exists():
                with contextlib.suppress(OSError):  # a full disk
                    file.touch()  # answers that nobody asks for are removed first
                return None
            if (wrong := find_out()) is None:
                _note(file)
            return wrong

        return self.once(question, ask, keeps=keeps)

    def _name(self, question: str) -> str:
        stack = [torch.__version__, transformers.__version__, peft.__version__, bitsandbytes.__version__, _attention()]
        stack.append(_CODE)
        said = repr([question, *self.about, torch.backends.cpu.get_cpu_capability(), *stack])
        return hashlib.sha256(said.encode()).hexdigest()


def _note(file: Path) -> None:
    with contextlib.suppress(OSError):  # a full disk: it is checked again
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        for old in sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-CHECKS_KEPT]:
            old.unlink(missing_ok=True)


def _attention() -> str | None:
    """The version of flash-attn, if installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("flash-attn")
    return None


def _code() -> str:
    """Our own part: a hash of the code that loads a base, adapts it and runs it."""
    rooms = Path(__file__).parent, Path(kernels.__file__).parent
    content = b"".join(path.read_bytes() for room in rooms for path in sorted(room.glob("*.py")))
    return hashlib.sha256(content).hexdigest()


_CODE = _code()
"""As of the import: an upgrade replaces the files while this process continues with the old code."""
