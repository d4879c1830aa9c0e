"""Tokenizers that a process has created: each belongs to one training at a time, and then to the next, as created."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loractl.worker.base.identity import Traits, traits_of

from .model_snapshot import copied

KEPT = 2
"""Tokenizers kept ready: a job that joins another needs its own."""


@dataclass(frozen=True, kw_only=True)
class BorrowedTokenizer:
    """A tokenizer that a training uses."""

    tokenizer: Any
    made: _Made | None  # None: nobody uses it afterwards


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A tokenizer's state when it was created. Creating it takes a sixth of a second: it reads a vocabulary."""

    traits: Traits  # of the files it was created from
    attributes: dict[str, Any]
    settings: tuple[Any, ...]  # of the part that is not Python's

    @classmethod
    def of(cls, tokenizer: Any, traits: Traits) -> _Made | None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None  # another kind, whose state is unknown
        settings = backend.padding, backend.truncation, backend.encode_special_tokens
        return cls(traits=traits, attributes=copied(vars(tokenizer)), settings=settings)

    def restore(self, tokenizer: Any) -> None:
        vars(tokenizer).clear()
        vars(tokenizer).update(copied(self.attributes))
        padding, truncation, special = self.settings
        backend = tokenizer.backend_tokenizer
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.encode_special_tokens = special


class Tokenizers:
    """The tokenizers of this process. Any thread may call it."""

    def __init__(self) -> None:
        self._free: list[tuple[Any, _Made]] = []
        self._lock = threading.Lock()

    def take(self, source: tuple[str, str | None], make: Callable[[], Any]) -> BorrowedTokenizer:
        """A tokenizer for the base with this name and revision, as `make` creates it. Raises what that raises."""
        try:
            traits = traits_of(*source)
        except OSError:
            return BorrowedTokenizer(tokenizer=make(), made=None)  # without files, its own error is better
        with self._lock:
            for place, (tokenizer, made) in enumerate(self._free):
                if made.traits == traits:
                    del self._free[place]
                    return BorrowedTokenizer(tokenizer=tokenizer, made=made)
        tokenizer = make()
        return BorrowedTokenizer(tokenizer=tokenizer, made=_Made.of(tokenizer, traits))

    def give_back(self, borrowed: BorrowedTokenizer) -> None:
        """A training no longer needs it. A failing training returns nothing."""
        if borrowed.made is None:
            return
        borrowed.made.restore(borrowed.tokenizer)
        with self._lock:
            self._free = [(borrowed.tokenizer, borrowed.made), *self._free][:KEPT]
