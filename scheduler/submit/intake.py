"""How a checked job gets into the queue: its row is committed, and the nodes are woken at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loractl.common.adapter_config import VLLM_RANKS
from loractl.common.artifacts import ArtifactStore
from loractl.common.channels import unknown_names
from loractl.common.errors import ServiceUnreachable
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Status
from loractl.common.job.sweep import NewSweep, SweepView
from loractl.common.placement.lines import vram_class
from loractl.common.queue.hints import HintSender, open_sender
from loractl.common.settings import Settings
from loractl.common.store.records import Submission
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import clock, gib

from .data import is_local, store_data
from .draft import JobDraft
from .need import own_devices, plan_job, stored_hashes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A job just queued."""

    job_id: int
    sentence: str  # says that it is queued
    warnings: tuple[str, ...]  # what could keep it waiting


def plan_all(
    drafts: Sequence[JobDraft], settings: Settings, store: Store | None, *, members: bool = False
) -> list[Submission]:
    """Each job's submission; all are checked before the first is written. `members`: of one sweep, where none names
    another. Raises UsageError."""
    planned = []
    beside = {} if members else {draft.spec.name: draft.spec for draft in drafts}
    known = _of_data(drafts, lambda draft: {**stored_hashes(draft.spec), **draft.stored})
    for draft, hashes in zip(drafts, known, strict=True):
        spec = with_own_channels(draft.spec, settings)
        submission = plan_job(spec, settings.user, hashes, store, own_devices(settings), beside)
        if not members:
            beside[spec.name] = submission.spec  # with what it inherits, since later jobs inherit that in turn
        planned.append(replace(submission, purpose="" if draft.like is None else f"like job {draft.like}"))
    return planned


def with_own_channels(spec: JobSpec, settings: Settings) -> JobSpec:
    """The spec with the channels that its user notifies about every job, if it names none itself."""
    if spec.notify is not None or not settings.notify:
        return spec
    return spec.model_copy(update={"notify": list(settings.notify)})


def store_all(drafts: Sequence[JobDraft], planned: Sequence[Submission], artifacts: ArtifactStore) -> list[Submission]:
    """Upload the data sets of all jobs before the first is queued. Raises ArtifactError, ServiceUnreachable."""
    stored = _of_data(drafts, lambda draft: store_data(draft.spec, artifacts, draft.stored))
    return [replace(submission, data=data) for submission, data in zip(planned, stored, strict=True)]


def _of_data(drafts: Iterable[JobDraft], ask: Callable[[JobDraft], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is asked about each draft's data sets, once for those that several have."""
    known: dict[Any, dict[str, Any]] = {}
    for draft in drafts:
        data_sets = (*draft.spec.data_sets().items(), draft.like)
        if data_sets not in known:
            known[data_sets] = ask(draft)
        yield known[data_sets]


def enqueue(submission: Submission, settings: Settings, store: Store) -> Entry:
    """Write the job and wake the nodes."""
    return enqueue_all([submission], settings, store)[0]


def enqueue_all(submissions: Sequence[Submission], settings: Settings, store: Store) -> list[Entry]:
    """Write all of the jobs or none, and wake the nodes. One may name those before it."""
    classes = sorted({vram_class(submission.first_need) for submission in submissions})
    with open_sender(settings) as sender:
        job_ids = store.jobs.submit_all(submissions)
        away = _ring(sender, classes, f"Job {job_ids[0]}" if len(job_ids) == 1 else "Every job")
    found = store.jobs.numbered(job_ids)
    outlook, entries = _outlook(store, list(found.values())), []
    for job_id, submission in zip(job_ids, submissions, strict=True):
        purpose = f", {submission.purpose}" if submission.purpose else ""
        waits = f"; it starts after job {found[job_id].awaits}" if found[job_id].awaits else ""
        sentence = f"Job {job_id} ({submission.spec.name}) is queued{purpose}{waits}."
        doubts = [*doubts_of(f"job {job_id}", submission, settings), *outlook.get(job_id, ())]
        entries.append(Entry(job_id=job_id, sentence=sentence, warnings=(*doubts, *away)))
        away = []
    return entries


def enqueue_sweep(
    new: NewSweep, members: Sequence[Submission], settings: Settings, store: Store
) -> tuple[SweepView, list[str]]:
    """Write all members or none, and wake the nodes. Returns the sweep, and warnings about its largest member alone."""
    classes = sorted({vram_class(member.first_need) for member in members})
    with open_sender(settings) as sender:
        sweep_id = store.sweeps.submit(new, members)
        away = _ring(sender, classes, f"Sweep {sweep_id}")
    sweep = store.sweeps.get(sweep_id)
    pairs = zip(sweep.members, members, strict=True)
    largest, submission = max(pairs, key=lambda pair: pair[1].first_need or 0)
    outlook = _outlook(store, [store.jobs.get(largest.job_id)]).get(largest.job_id, ())
    return sweep, [*doubts_of(f"job {largest.job_id}", submission, settings), *outlook, *away]


def _outlook(store: Store, jobs: Sequence[Job]) -> dict[int, tuple[str, ...]]:
    """Of jobs that wait, those that no card could ever hold, and when others start that have to wait, where known."""
    from loractl.common.text import in_words
    from loractl.scheduler.wait.reasons import AT_ONCE_S, Tier, explain
    from loractl.scheduler.wait.starts import LISTED_JOBS, read_outlook

    view = store.cards.fleet()
    starts = read_outlook(store, view, [job.job_id for job in jobs], store.jobs.ready(LISTED_JOBS + 1)).starts
    told = dict[int, tuple[str, ...]]()
    for job in jobs:
        if job.status is not Status.QUEUED:
            continue
        wait, start = explain(job, view), starts.get(job.job_id)
        if wait.tier is Tier.NEVER:
            what = f"Warning: job {job.job_id} can't start: {wait.sentence}; loractl why {job.job_id} says what helps."
            told[job.job_id] = (what,)
        elif start is not None and (start.at - view.now).total_seconds() > AT_ONCE_S:
            at, on = clock(start.at, view.now), in_words(start.nodes)
            told[job.job_id] = (f"Note: job {job.job_id} is expected to start about {at} on {on}.",)
    return told


def wake_for(job: Job, sender: HintSender) -> list[str]:
    """Wake the nodes for a job that waits. Returns warnings if the queue is down."""
    return _ring(sender, [job.vram_class], f"Job {job.job_id}") if job.status is Status.QUEUED else []


def _ring(sender: HintSender, size_classes: Iterable[int], what: str) -> list[str]:
    """Wake the nodes. Returns warnings if the queue is down."""
    try:
        sender.wake(size_classes)
    except ServiceUnreachable as error:
        return [
            f"Warning: {error.sentence}: {error.hint}.",
            f"{what} is safe in the database; workers find it there within seconds.",
        ]
    return []


def doubts_of(name: str, submission: Submission, settings: Settings) -> list[str]:
    """What may fail on its worker, or is not as a person may think. `name`: of the job."""
    spec = submission.spec
    doubts = unknown_names(spec.notify, settings.channels, settings.user)
    if not spec.publish:
        doubts.append(f"Note: the adapter of {name} must stay in the lab: publish is false.")
    for text in spec.data_sets().values():
        if not is_local(text):
            doubts.append(f"Note: {text} is not a file here, so it is read from the hub.")
    return [*doubts, *_refused_by_vllm(name, spec)]


def _refused_by_vllm(name: str, spec: JobSpec) -> list[str]:
    """A note about what vLLM will refuse of the adapter, as `adapters pull --vllm` does."""
    lora, most = spec.lora, VLLM_RANKS[-1]
    what = [
        *(["DoRA (lora.use_dora)"] if lora.use_dora else []),
        *(["lora.modules_to_save"] if lora.modules_to_save else []),
        *([f"ranks above {most} (lora.r is {lora.r})"] if lora.r > most else []),
    ]
    if not what or not spec.kind.writes:
        return []
    other = "loractl serves it, and loractl adapters merge writes a whole model"
    return [f"Note: vLLM will refuse the adapter of {name}: it takes no {' and no '.join(what)}; {other}."]


def too_large(name: str, submission: Submission, store: Store | None) -> list[str]:
    """Of a dry run: whether a job would wait forever. `name`: of the job."""
    nodes = [] if store is None else store.cards.nodes()
    least, largest = submission.first_need, max((node.usable for node in nodes), default=None)
    if least is not None and largest is not None and least > largest:
        return [f"Warning: {name} needs {gib(least)} GiB by its plan, the largest device known has {gib(largest)}."]
    return []
