"""Tokenizers that a process has made: each is one training's at a time, and then the next one's, as it was made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loractl.worker.base.identity import Traits, traits_of

from .model_snapshot import copied

KEPT = 2
"""Tokenizers that wait: a job that joins another one needs one beside its."""


@dataclass(frozen=True, kw_only=True)
class BorrowedTokenizer:
    """A tokenizer that one training has."""

    tokenizer: Any
    made: _Made | None  # None: nobody has it afterwards


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What a tokenizer was when it was made. To make it takes a sixth of a second: it reads a vocabulary."""

    traits: Traits  # of the files that it was made of
    attributes: dict[str, Any]
    settings: tuple[Any, ...]  # of the part that is not Python's

    @classmethod
    def of(cls, tokenizer: Any, traits: Traits) -> _Made | None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None  # one of another kind, whose state is not known
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
    """Those of this process. Any thread may call it."""

    def __init__(self) -> None:
        self._free: list[tuple[Any, _Made]] = []
        self._lock = threading.Lock()

    def take(self, source: tuple[str, str | None], make: Callable[[], Any]) -> BorrowedTokenizer:
        """A tokenizer of the base of that name and revision, as `make` makes it. Raises what that does."""
        try:
            traits = traits_of(*source)
        except OSError:
            return BorrowedTokenizer(tokenizer=make(), made=None)  # where there are no files, it says so better
        with self._lock:
            for place, (tokenizer, made) in enumerate(self._free):
                if made.traits == traits:
                    del self._free[place]
                    return BorrowedTokenizer(tokenizer=tokenizer, made=made)
        tokenizer = make()
        return BorrowedTokenizer(tokenizer=tokenizer, made=_Made.of(tokenizer, traits))

    def give_back(self, borrowed: BorrowedTokenizer) -> None:
        """A training needs it no more. One that fails gives nothing back."""
        if borrowed.made is None:
            return
        borrowed.made.restore(borrowed.tokenizer)
        with self._lock:
            self._free = [(borrowed.tokenizer, borrowed.made), *self._free][:KEPT]
