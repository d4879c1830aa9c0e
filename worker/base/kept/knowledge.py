"""What was found out about a base, here or before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Found = TypeVar("Found")


@dataclass(frozen=True)
class Known(Generic[Found]):
    """An answer, and the job that found it out."""

    answer: Found
    job_id: int


class Once(Protocol[Found]):
    """Finds something out about the base unless it is known. `keeps`: whether others may use it."""

    def __call__(
        self, question: str, find_out: Callable[[], Found], /, *, keeps: Callable[[Found], bool]
    ) -> Known[Found]: ...
