"""How a finished job runs again, from its row and its report, and what can't be the same."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import UsageError
from loractl.common.fingerprint import changed_files, fingerprint
from loractl.common.job.adjustment import Adjustment, adjusted
from loractl.common.job.ancestor import settled_on
from loractl.common.job.file import override_spec
from loractl.common.job.method import Method
from loractl.common.job.names import REPRODUCES
from loractl.common.job.spec import JobSpec, data_set_key
from loractl.common.settings import Settings
from loractl.common.store.fleet import NODE_STALE_S
from loractl.common.store.records import Submission
from loractl.common.store.store import Store
from loractl.common.store.tables import Attempt, Job, Node
from loractl.common.text import clean_line
from loractl.scheduler.report.answer import result_of
from loractl.scheduler.submit.need import own_devices, plan_job

MOST_LABELS = 32


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """Something that can't be, or might not be, the same as before."""

    what: str
    then: str
    now: str


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """How a finished job runs again."""

    job_id: int  # of the repeated job
    spec: JobSpec
    adjustment: Adjustment
    data: dict[str, Any]
    caveats: tuple[Caveat, ...]
    new: int | None = None  # the new job, once queued

    def as_json(self) -> dict[str, Any]:
        """The repetition as JSON values.

        `job_id`: of the new job, null when none was queued; `reproduces`: of the repeated job; `different`: each thing
        that can't be the same, or is not known to be, with `what`, `then`, `now`; the `adjustment`, `spec` and `data`
        that it runs with.
        """
        return {
            "job_id": self.new,
            REPRODUCES: self.job_id,
            "different": [vars(caveat) for caveat in self.caveats],
            "adjustment": self.adjustment.as_json(),
            "spec": self.spec.model_dump(mode="json"),
            "data": self.data,
        }


def repetition(store: Store, artifacts: ArtifactStore, settings: Settings, job_id: int) -> Repetition:
    """How a finished job would run again. Raises JobNotFound, WrongState without a result, and what plan_repetition
    raises."""
    job, stored = result_of(store, job_id)
    return plan_repetition(job, artifacts.read_report(stored), store, settings)


def plan_repetition(job: Job, report: dict[str, Any], store: Store, settings: Settings) -> Repetition:
    """The same resolved spec, method and split of the batch, and what can't be the same.

    Raises SpecError for a spec that this version can't read, UsageError if no label is left.
    """
    spec, now = _same_spec(job, report), store.now()
    online = [node for node in store.cards.nodes() if (now - node.seen_at).total_seconds() <= NODE_STALE_S]
    caveats = (
        *_versions(report, online),
        *_devices(store.attempts.of_job(job.job_id), online),
        *_base(spec, report, settings.cache_dir),
        *_hub_data(spec, job),
        *_changes(report),
        *_date(report, now),
        *_company(report),
    )
    adjustment = Adjustment(**report["training"].get("adjustment", {}))
    return Repetition(job_id=job.job_id, spec=spec, adjustment=adjustment, data=job.data, caveats=caveats)


def submission_of(repetition: Repetition, settings: Settings, store: Store) -> Submission:
    """The new job's submission. Its need is planned for the split of the batch with which the old run ended."""
    runs = adjusted(repetition.spec, repetition.adjustment)
    planned = plan_job(runs, settings.user, repetition.data, store, own_devices(settings))
    purpose = f"to reproduce job {repetition.job_id}"
    return replace(planned, spec=repetition.spec, adjustment=repetition.adjustment, purpose=purpose)


def _same_spec(job: Job, report: dict[str, Any]) -> JobSpec:
    """The job's spec with what was chosen for it fixed: method, number format, optimizer, whether it recomputes, the
    member of a sweep that it began from, and the commits of hub content."""
    spec, training = override_spec(job.spec, (), f"job {job.job_id}"), report["training"]
    taken = {"dtype": training["precision"], "optim": training["optim"]}
    left = {key: value for key, value in taken.items() if getattr(spec.training, key) == "auto"}
    if spec.training.gradient_checkpointing is None:
        left["gradient_checkpointing"] = training.get("gradient_checkpointing")  # an early report has none
    labels = {**spec.labels, REPRODUCES: str(job.job_id)}
    if len(labels) > MOST_LABELS:
        raise UsageError(
            f"job {job.job_id} has {MOST_LABELS} labels, so that none is left for {REPRODUCES}",
            f"take what is stored and submit it yourself: loractl status {job.job_id} --full",
        )
    named, commits = spec.data_sets(), report["data"].get("commits", {})
    data = {key: f"{named[key].partition('@')[0]}@{commit}" for key, commit in commits.items()}
    pinned = settled_on(spec.with_data_sets(data), job.ancestor)
    return pinned.model_copy(
        update={
            "after": [],  # its turn has come
            "after_any": False,
            "method": Method(report["method"]),
            "lora_patience": None,
            "revision": report.get("base", {}).get("commit") or spec.revision,
            "training": spec.training.model_copy(update=left),
            "labels": labels,
        }
    )


def _versions(report: dict[str, Any], online: Sequence[Node]) -> Iterator[Caveat]:
    """Packages whose version on the workers differs from the report's."""
    if not online:
        yield Caveat(what="versions and device", then="in its report", now="unknown: no worker is online")
    for name, then in report["versions"].items():
        others: dict[str, str] = {}  # version -> the first node that has it
        for node in online:
            if (version := node.versions.get(name, "a worker that does not say")) != then:
                others.setdefault(version, node.node)
        if others:
            now = ", ".join(f"{clean_line(version)} on {clean_line(node)}" for version, node in others.items())
            yield Caveat(what=name, then=clean_line(then), now=now)


def _devices(attempts: Sequence[Attempt], online: Sequence[Node]) -> Iterator[Caveat]:
    """Devices of another model than the job's; they sum in another order."""
    used = list(dict.fromkeys(clean_line(attempt.device_name or attempt.node) for attempt in attempts))
    named = {clean_line(node.device_name): clean_line(node.node) for node in online}
    others = {device: node for device, node in named.items() if device != used[-1]}
    if others:
        yield Caveat(what="device", then=used[-1], now=", ".join(f"{name} on {node}" for name, node in others.items()))
    if len(used) > 1 and attempts[-1].resumed_from_step:
        yield Caveat(what="device", then=" and then ".join(used), now="one attempt on one device")


def _base(spec: JobSpec, report: dict[str, Any], cache: Path) -> Iterator[Caveat]:
    """A base model whose files have changed, or can't be checked from here."""
    base, folder = report.get("base"), Path(spec.base_model)
    if not folder.is_absolute():
        if base is None:  # a report of an earlier version
            now = f"revision {spec.revision or 'main'} as it is today"
            yield Caveat(what="base model", then="its commit is not in the report", now=now)
        return
    if base is None:
        yield Caveat(what="base model", then="its hash is not in the report", now=str(folder))
    elif not folder.is_dir():
        yield Caveat(what="base model", then=f"sha256 {base['sha256'][:12]}", now="not on this machine: --check shows")
    elif changed := changed_files(base["files"], fingerprint(folder, cache)):
        yield Caveat(what="base model", then=f"sha256 {base['sha256'][:12]}", now=f"{', '.join(changed)} changed")


def _hub_data(spec: JobSpec, job: Job) -> Iterator[Caveat]:
    """Data from the hub without a known commit: the main branch may have moved."""
    for key, text in spec.data_sets().items():
        if key not in job.data and "@" not in text:
            now = "the hub's main branch as it is today, with no revision to hold it"
            yield Caveat(what=data_set_key(key), then=clean_line(text), now=now)


def _changes(report: dict[str, Any]) -> Iterator[Caveat]:
    """A change in mid-training: the repetition uses the last split of the batch from its first step on."""
    training = report["training"]
    if training.get("changes") and training["resumed_from_step"]:
        now = f"{training['per_device_train_batch_size']} rows at once from the first step"
        yield Caveat(what="batch", then=clean_line(training["changes"][-1]), now=now)


def _date(report: dict[str, Any], now: dt.datetime) -> Iterator[Caveat]:
    """The date that the chat template writes: it is that of the submit."""
    then, today = report["data"].get("prompt_date"), now.date().isoformat()
    if then is not None and then != today:
        yield Caveat(what="date in the prompts", then=clean_line(then), now=today)


def _company(report: dict[str, Any]) -> Iterator[Caveat]:
    """Jobs that were in the same trainer, as earlier versions had it."""
    others = report["training"].get("companions") or ()
    if others:
        then = ", ".join(map(str, others))
        yield Caveat(what="other jobs in its trainer", then=then, now="none")
