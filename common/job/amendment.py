"""What may still change of a submitted job: nearly all before it begins, then what leaves its checkpoints valid."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loractl.common.errors import UsageError
from loractl.common.units import duration, gib

from .identity import BATCH, RECOMPUTED, UNDECIDING, changed_parts
from .method import Method, permitted_methods
from .spec import JobSpec, spec_keys
from .sweep import setting

WHILE_IT_RUNS = ("labels", "preemptible", "priority", "resources.time_limit")
"""Keys whose change reaches a running job."""

_ITS_OWN = frozenset({"base_model", "revision", "task_type", "evaluation.regression"})
_READ_ALIKE = frozenset({"dataset.max_length", "dataset.on_overflow"})
"""Keys of `dataset` that may change without another look at the stored rows."""

_PARTS = frozenset({"dataset", "lora", "training"})
"""Sections that are parts of their own; every other key belongs to the part called job, see training_digests."""

_TIMES = frozenset({"resources.time_limit", "lora_patience"})


class Standing(enum.Enum):
    """How far a job has come, for what may still change."""

    NEW = "was not begun"  # or ended before its first step: a change can make nothing useless
    BEGUN = "has begun"  # it waits again, or has ended: its checkpoints and its history are of one training
    RUNNING = "is running"


@dataclass(frozen=True, kw_only=True)
class KeyChange:
    """A key with the value that it had and the one that it gets."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.key, self.before)} -> {_shown(self.key, self.after)}"


def changes(before: JobSpec, after: JobSpec) -> tuple[KeyChange, ...]:
    """The keys in which two specs differ."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    pairs = ((key, setting(old, key), setting(new, key)) for key in spec_keys())
    return tuple(KeyChange(key=key, before=one, after=other) for key, one, other in pairs if one != other)


@dataclass(frozen=True, kw_only=True)
class Amended:
    """A submitted job and its new spec."""

    job_id: int
    standing: Standing
    taken: Method | None  # by its last attempt
    in_sweep: bool
    before: JobSpec
    after: JobSpec

    def require_allowed(self) -> None:
        """Refuse changes that would make it another training. Raises UsageError, which names the remaining way."""
        keys = [change.key for change in changes(self.before, self.after)]
        if not keys:
            raise UsageError(
                f"job {self.job_id} has these settings already", f"see them: loractl status {self.job_id} --full"
            )
        if self.standing is Standing.RUNNING and (late := [key for key in keys if key not in WHILE_IT_RUNS]):
            what = f"{', '.join(late)} can't change while job {self.job_id} runs; {', '.join(WHILE_IT_RUNS)} can"
            raise UsageError(what, self._way_for(late))
        if data := [key for key in keys if _reads_otherwise(key)]:
            raise self._refusal(data, "was submitted")
        bound = self.standing is not Standing.NEW or self.in_sweep
        if bound and (others := list(self._of_another_training(keys))):
            why = "belongs to a sweep" if self.standing is Standing.NEW else self.standing.value
            raise self._refusal(others, why)

    def _refusal(self, keys: Sequence[str], why: str) -> UsageError:
        return UsageError(
            f"{', '.join(keys)} can't change once job {self.job_id} {why}: it would be a different training",
            self._as_its_own(keys[0]),
        )

    def _way_for(self, late: Sequence[str]) -> str:
        """What to do for a running job: once stopped it may take these keys, or it will still refuse them."""
        refused = [*filter(_reads_otherwise, late), *self._of_another_training(late)]
        if refused:
            return self._as_its_own(refused[0])
        return f"stop it first: loractl cancel {self.job_id}, then loractl retry {self.job_id} --set {late[0]}=..."

    def _as_its_own(self, key: str) -> str:
        return f"queue it as a new job: loractl submit --like {self.job_id} --set {key}=..."

    def _of_another_training(self, keys: Sequence[str]) -> Iterator[str]:
        """Keys whose change makes the checkpoints useless, or a sweep's losses impossible to compare."""
        method = self.taken or permitted_methods(self.before.method)[0]
        parts = changed_parts(self.before, self.after, method)
        same_batch = self.before.training.effective_batch == self.after.training.effective_batch
        free = UNDECIDING | {f"training.{key}" for key in (RECOMPUTED | BATCH if same_batch else RECOMPUTED)}
        for key in keys:
            section = key.partition(".")[0]
            if key in free or section in free:
                continue
            if key == "method":
                refused = method not in permitted_methods(self.after.method)
            elif section == "evaluation":
                refused = self.in_sweep
            else:
                refused = section in parts or ("job" in parts and section not in _PARTS)
            if refused:
                yield key


def _reads_otherwise(key: str) -> bool:
    """Whether the key names data or a base, or changes how data are read."""
    return key in _ITS_OWN or (key.startswith("dataset.") and key not in _READ_ALIKE)


def _shown(key: str, value: Any) -> str:
    if value is not None and key in _TIMES:
        return duration(value)
    if value is not None and key == "resources.max_vram":
        return f"{gib(value)} GiB"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
