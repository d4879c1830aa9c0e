"""Knowledge: what a process found out about its base, once for all trainings that ask the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

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
