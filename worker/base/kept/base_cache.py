"""The base and the tokenizers that a trainer process has loaded, cached for consecutive trainings."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from loractl.common.fingerprint import changed_files
from loractl.common.job.status import Reason
from loractl.common.memory.context import CONTEXT_BYTES

from ..arithmetic import draws
from ..failure import TrainingFailed
from ..gauge import forget_peaks, lift_limit, release
from ..source import BaseIdentity, Traits, pin, traits_of
from .knowledge import Knowledge
from .model_snapshot import ModelSnapshot, copied
from .remains import Code, ProcessBaseline, Switches

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


Made = TypeVar("Made")

SETTINGS = frozenset({"config.json", "generation_config.json", "adapter_config.json"})
"""Files whose presence decides what is loaded: adding or removing one is a change."""


class BaseCache:
    """Holds at most one base. A training takes it from here; afterwards it is restored to its loaded state.

    `key`: what decides how the base was loaded, as the node names it. `knowledge`: about the base that it holds.
    `tokenizers`: of the trainings before.
    """

    def __init__(self) -> None:
        self._snapshot: ModelSnapshot | None = None
        self._key: str | None = None
        self._traits: Traits = frozenset()
        self._identity: BaseIdentity | None = None  # of the files it was loaded from
        self._hashes = Path()  # hashes are stored below it
        self._why_not: str | None = None  # this base may not stay
        self._before: ProcessBaseline | None = None
        self._switches: Switches | None = None
        self._code: Code | None = None  # that trainings on this base call
        self._common: Any = None  # what trainings derive from the base for all of them
        self.knowledge = Knowledge()
        self.tokenizers = Tokenizers()

    @property
    def size(self) -> int:
        """Bytes of the device that the base takes, the context of a card included; 0: it does not stay."""
        if self._snapshot is None:
            return 0
        return self._snapshot.size + (CONTEXT_BYTES if torch.cuda.is_initialized() else 0)

    def begin(self) -> None:
        """Start a training in this process, which has no other."""
        pin.cache_clear()  # a branch on the hub may have moved since
        if self._snapshot is not None:
            forget_peaks()
        self._before, self._switches = ProcessBaseline(), Switches()

    def base(
        self,
        key: str | None,
        source: tuple[str, str | None],
        load: Callable[[], Any],
        *,
        joins: bool = False,
        tell: Callable[[str], None] = lambda text: None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> tuple[Any, bool]:
        """The base, and whether it was here. `source`: its name and revision. `key`: None for a base that never stays.
        `check_stop` is called while its files are hashed; `tell` announces that first.

        Raises TrainingFailed(host_lost) for a training that must find it here (`joins`) and does not.
        """
        traits: Traits = frozenset() if key is None else traits_of(*source)
        if self._snapshot is not None and self._key == key and self._same_files(source, traits, tell, check_stop):
            return self._snapshot.model, True
        if joins:
            raise TrainingFailed(Reason.HOST_LOST, "the trainer that it was about to join has another base")
        self._snapshot = self._common = self._identity = None
        self.knowledge = Knowledge()
        gc.collect()
        model = load()
        if key is not None:
            self._key, self._traits = key, _after_loading(source, traits)
            self._why_not = _unfit(model)
            self._snapshot = None if self._why_not else ModelSnapshot(model)
            self._code = Code(model)
        return model, False

    def compare(
        self,
        key: str | None,
        source: tuple[str, str | None],
        tell: Callable[[str], None],
        check_stop: Callable[[], None],
    ) -> None:
        """Hash in advance what `base` will ask for, while others compute: a large base's files take minutes."""
        if key is not None and self._snapshot is not None and self._key == key:
            self._same_files(source, traits_of(*source), tell, check_stop)

    def identify(self, cache: Path, source: tuple[str, str | None]) -> BaseIdentity:
        """Start to hash the files of a training's base, with the hashes stored below `cache`."""
        found, self._hashes = BaseIdentity(*source, cache), cache
        self._identity = self._identity or found
        return found

    def _same_files(
        self,
        source: tuple[str, str | None],
        traits: Traits,
        tell: Callable[[str], None],
        check_stop: Callable[[], None],
    ) -> bool:
        """Whether the base that is here would be loaded from these files: by their metadata, else by content."""
        if self._traits == traits:
            return True
        if self._identity is None:
            return False
        tell("compares the base's files with those that were loaded")
        if (then := self._identity.files_at(self._traits, check_stop)) is None:
            return False
        found = BaseIdentity(*source, self._hashes)
        now = found.files_at(traits, check_stop)
        if now is None or changed_files(then, now) or not SETTINGS.isdisjoint(then.keys() ^ now.keys()):
            return False
        self._traits, self._identity = traits, found
        return True

    def common(self, make: Callable[[Any], Made], base: Any) -> Made:
        """What the trainings on a base that stays share: made by the first, dropped after the last. A base that does
        not stay belongs to its training alone."""
        if self._snapshot is None or self._snapshot.model is not base:
            return make(base)
        if self._common is None:
            self._common = (make(base),)
        made: Made = self._common[0]
        return made

    def change(self) -> str | None:
        """What in the base is no longer as loaded, in words; None: nothing."""
        return None if self._snapshot is None else self._snapshot.change()

    def settle(self) -> tuple[int | None, str]:
        """After a training: restore the base, and look for leftovers.

        Returns the bytes that stay; or None, and why this process must end.
        """
        if self._snapshot is None or self._before is None:
            return None, self._why_not or "no base was loaded that may stay"
        lift_limit()
        self._common = None
        self._snapshot.restore()
        self._before.restore()
        release()
        why = self._before.left(self._snapshot.tensors) or self._snapshot.change() or self._switched()
        if why is None and not forget_peaks():
            why = "the peak of its memory can't be set back"
        return (None, why) if why else (_held(self._snapshot), "")

    def _switched(self) -> str | None:
        """What the training has switched for the next one."""
        assert self._switches is not None and self._code is not None
        return self._switches.changed() or self._code.changed()


def _after_loading(source: tuple[str, str | None], before: Traits) -> Traits:
    """The traits of the loaded files. Files downloaded from the hub during the load belong to them; a file that was
    there may have changed before or after it was read: then no other traits equal these."""
    after = traits_of(*source)
    return after if not Path(source[0]).is_absolute() and before < after else before


def _held(snapshot: ModelSnapshot) -> int:
    """Bytes of the device that the process holds with its base; on a CPU only those of the base."""
    return torch.cuda.memory_reserved() + CONTEXT_BYTES if torch.cuda.is_initialized() else snapshot.size


def _unfit(model: Any) -> str | None:
    """Why a base is for only one training."""
    if not type(model).__module__.startswith("transformers."):
        return "the model runs its own code"
    if draws(model):
        return "the base has its own dropout"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "the base has a loss for its router"
    return None
