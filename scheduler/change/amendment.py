"""A change of a submitted job: checked, and planned again if it changes the job's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loractl.common.channels import unknown_names
from loractl.common.errors import WrongState
from loractl.common.job.amendment import Amended, Standing, changes
from loractl.common.job.file import amended_spec, override_spec
from loractl.common.job.method import Method, Need, Ways
from loractl.common.job.status import Status
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import MemoryPlan
from loractl.common.memory.need_key import need_key
from loractl.common.store.columns import word
from loractl.common.store.records import Amendment, Submission
from loractl.scheduler.submit.ancestor import settle_predecessors
from loractl.scheduler.submit.draft import JobDraft, rows_at_hand
from loractl.scheduler.submit.need import admit, open_methods, plan_job
from loractl.scheduler.submit.overflow import check_overflow, unchecked

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore
    from loractl.common.job.spec import JobSpec
    from loractl.common.settings import Settings
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


def amendment(store: Store, job_id: int, overrides: Sequence[str]) -> Amendment:
    """What `KEY=VALUE` overrides change in a job, for `store.jobs.edit` and `store.jobs.retry`.

    Raises JobNotFound, SpecError, UsageError for a change that would make it a different training, WrongState once it
    has a result.
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
    Amended(
        job_id=job_id,
        standing=_standing(store, job),
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


def _standing(store: Store, job: Job) -> Standing:
    if job.status is Status.RUNNING:
        return Standing.RUNNING
    return Standing.BEGUN if job.attempt and _has_trained(store, job) else Standing.NEW


def _has_trained(store: Store, job: Job) -> bool:
    """Whether an attempt has taken a step. A retry forgets the last attempt's steps, but its losses stay."""
    left = job.checkpoint is not None or job.result_host is not None
    return left or bool(job.step) or bool(store.jobs.metrics(job.job_id, "loss"))


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
