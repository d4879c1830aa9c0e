"""A change of a submitted job: whether it is still allowed, checked, and planned again if it changes the job's memory.

Nearly all may change before the job begins, then what leaves its checkpoints valid.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.channels import unknown_names
from loractl.common.errors import UsageError, WrongState
from loractl.common.job.file import amended_spec, override_spec
from loractl.common.job.identity import BATCH, RECOMPUTED, UNDECIDING, changed_parts
from loractl.common.job.method import Method, Need, Ways, permitted_methods
from loractl.common.job.spec import JobSpec, spec_keys
from loractl.common.job.status import Status
from loractl.common.job.sweep import setting
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import MemoryPlan
from loractl.common.memory.need_key import need_key
from loractl.common.settings import Settings
from loractl.common.store.columns import word
from loractl.common.store.records import Amendment, Submission
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import duration, gib
from loractl.scheduler.submit.ancestor import settle_predecessors
from loractl.scheduler.submit.draft import JobDraft, rows_at_hand
from loractl.scheduler.submit.lengths import check_overflow, unchecked
from loractl.scheduler.submit.need import admit, open_methods, plan_job


def amendment(store: Store, job_id: int, overrides: Sequence[str]) -> Amendment:
    """What `KEY=VALUE` overrides change in a job, for `store.jobs.edit` and `store.jobs.retry`.

    Raises JobNotFound, SpecError, UsageError for a change that would make it a different training, NoChange, WrongState
    once it has a result.
    """
    job = store.jobs.get(job_id)
    if job.status is Status.SUCCEEDED:
        raise WrongState(
            f"job {job_id} has succeeded and can't be changed",
            f"queue another: loractl submit --like {job_id} --set KEY=VALUE",
        )
    name = f"job {job_id}"
    before = override_spec(job.spec, (), name)
    after = amended_spec(job.spec, overrides, name, Path.cwd())
    if job.status is not Status.RUNNING:  # it has begun from its ancestor: what that one says later changes nothing
        after = settle_predecessors(after, store, job_id=job_id, before=before)
    standing = Standing.RUNNING if job.status is Status.RUNNING else Standing.NEW
    # a retry forgets the last attempt's steps, but its losses stay
    left = job.checkpoint is not None or job.result_host is not None or job.step
    if standing is Standing.NEW and job.attempt and (left or store.jobs.metrics(job_id, "loss")):
        standing = Standing.BEGUN
    Amended(
        job_id=job_id,
        standing=standing,
        taken=word(Method, job.method) if job.method else None,
        in_sweep=job.sweep_id is not None,
        before=before,
        after=after,
    ).require_allowed()
    replanned = need_key(before, job.data) != need_key(after, job.data)
    if replanned:
        submission = plan_job(after, job.user, job.data, store, before=before)
    else:
        submission = _with_known_need(job, before, after)
    text = ", ".join(map(str, changes(before, after)))
    seen = job.status, job.attempt, job.spec
    return Amendment(
        job_id=job_id,
        seen=seen,
        submission=submission,
        replanned=replanned,
        new_batch=before.training.effective_batch != after.training.effective_batch,
        text=text,
    )


def unchecked_rows(
    changed: Amendment, open_store: Callable[[], ArtifactStore], announce: Callable[[], None]
) -> list[str]:
    """Check a job's rows again if a change cuts or refuses different ones. Returns what could not be checked.

    Raises UsageError and DataError for rows that the worker would refuse, ArtifactError for rows that are gone.
    """
    (_, _, before), submission = changed.seen, changed.submission
    if before["dataset"] == submission.spec.dataset.model_dump(mode="json"):
        return []
    draft = JobDraft(spec=submission.spec, like=changed.job_id, stored=submission.data)
    with rows_at_hand(draft, open_store()) as spec:
        return unchecked(check_overflow(spec, announce))


def unknown_channels(changed: Amendment, settings: Settings) -> list[str]:
    """Warnings about channels that the change names and this machine lacks."""
    (_, _, before), spec = changed.seen, changed.submission.spec
    if before.get("notify") == spec.notify:
        return []
    return unknown_names(spec.notify, settings.channels, changed.submission.user)


def require_unended(store: Store, job_id: int) -> None:
    """Raises WrongState for a job that has ended: a change alone would not run it."""
    job = store.jobs.get(job_id)
    if job.status in (Status.FAILED, Status.CANCELLED):
        raise WrongState(
            f"job {job_id} {job.status.in_words}: it does not wait",
            f"loractl retry {job_id} --set KEY=VALUE queues it again with the change",
        )


def _with_known_need(job: Job, before: JobSpec, after: JobSpec) -> Submission:
    """The changed job, if nothing that decides its memory has changed: it keeps its need with all that its attempts
    have measured, for one card and for each of several."""
    need, methods = Need(lora=job.vram_lora, qlora=job.vram_qlora), tuple(Method(name) for name in job.methods)
    ways = Ways.read(job.gangs)
    if _divided(before) != _divided(after):
        methods, ways = admit(after, open_methods(after), need, need)
    shape = read_shape(after.base_model, after.revision)
    parameters = None if shape is None else shape.active_parameters
    plan = MemoryPlan(need=need, planned=need, need_key=job.need_key, family=job.family, parameters=parameters)
    return Submission(spec=after, user=job.user, data=job.data, plan=plan, methods=methods, ways=ways)


def _divided(spec: JobSpec) -> tuple[object, ...]:
    """What decides, apart from its memory, on how many cards and with which methods a job may run."""
    asked = spec.resources
    return spec.method, asked.max_vram, asked.cards, asked.parallel, spec.training.even_cards


WHILE_IT_RUNS = ("labels", "preemptible", "priority", "resources.time_limit")
"""Keys whose change reaches a running job."""

_ITS_OWN = frozenset({"base_model", "revision", "task_type", "evaluation.regression"})
_READ_ALIKE = frozenset({"dataset.max_length", "dataset.on_overflow"})
"""Keys of `dataset` that may change without another look at the stored rows."""

_PARTS = frozenset({"dataset", "lora", "training"})
"""Sections that are parts of their own; every other key belongs to the part called job, see training_digests."""


class Standing(enum.Enum):
    """How far a job has come, for what may still change."""

    NEW = "was not begun"  # or ended before its first step: a change can make nothing useless
    BEGUN = "has begun"  # it waits again, or has ended: its checkpoints and its history are of one training
    RUNNING = "is running"


class NoChange(UsageError):
    """The job has these settings already."""

    def __init__(self, job_id: int) -> None:
        super().__init__(f"job {job_id} has these settings already", f"see them: loractl status {job_id} --full")


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
        """Refuse changes that would make it another training. Raises UsageError, which names the remaining way, and
        NoChange."""
        keys = [change.key for change in changes(self.before, self.after)]
        if not keys:
            raise NoChange(self.job_id)
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
    if value is not None and key in ("resources.time_limit", "lora_patience"):
        return duration(value)
    if value is not None and key == "resources.max_vram":
        return f"{gib(value)} GiB"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
