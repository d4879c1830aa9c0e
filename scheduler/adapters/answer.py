"""The stored adapters: what people call them, and where each comes from."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.adapter_config import CONFIG, check_adapter_config, check_adapter_weights
from loractl.common.artifacts import WEIGHTS, ArtifactStore, Binding, Manifest, attempt_prefix
from loractl.common.binding import result_binding
from loractl.common.errors import UsageError
from loractl.common.job.names import LATEST, parse_reference
from loractl.common.store.records import Page
from loractl.common.store.store import Store
from loractl.common.store.tables import Adapter, Job


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """One adapter with its tags."""

    job_id: int
    attempt: int
    name: str
    base_model: str
    method: str
    uri: str
    size: int  # bytes
    sha256: str
    created_at: dt.datetime
    tags: tuple[str, ...]
    init_from: int | None = None  # the job whose adapter it started from

    @property
    def tags_set(self) -> tuple[str, ...]:
        """The tags that a person has set."""
        return tuple(tag for tag in self.tags if tag != LATEST)

    @property
    def prefix(self) -> str:
        """Where its files are in the artifact store."""
        return attempt_prefix(self.job_id, self.attempt)

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names; `tags` with latest."""
        return {**vars(self), "created_at": self.created_at.isoformat(), "tags": list(self.tags)}


@dataclass(frozen=True, kw_only=True)
class AdapterList:
    """A page of the stored adapters, the oldest first."""

    adapters: tuple[StoredAdapter, ...]
    after: int | None  # the next page of older adapters starts after this job; None: there is none
    now: dt.datetime

    def as_json(self) -> list[dict[str, Any]]:
        """Each with StoredAdapter's fields."""
        return [adapter.as_json() for adapter in self.adapters]


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where an adapter comes from."""

    adapter: StoredAdapter
    user: str
    spec: dict[str, Any]
    report: dict[str, Any]
    now: dt.datetime
    bound: bool  # whether its row has the hash of its manifest

    def as_json(self) -> dict[str, Any]:
        """StoredAdapter's fields, and:

        `user`; `bound`; `revision` and `lora` of the job's spec; `data`: its `format`, `sha256`, `train_rows` and
        `held_out_rows`; the report's `verdict` and `versions`.
        """
        data = self.report["data"]
        return {
            **self.adapter.as_json(),
            "user": self.user,
            "bound": self.bound,
            "revision": self.spec.get("revision"),
            "lora": self.spec["lora"],
            "data": {key: data[key] for key in ("format", "sha256", "train_rows", "held_out_rows")},
            "verdict": self.report["verdict"],
            "versions": self.report["versions"],
        }


def adapter_list(store: Store, page: Page) -> AdapterList:
    """A page of the stored adapters; the first page has the newest ones."""
    found = store.adapters.newest(page)
    rows = found[: page.limit][::-1]
    numbers = [row.job_id for row in rows]
    tags, ancestors = store.adapters.tags(numbers), store.adapters.ancestors(numbers)
    return AdapterList(
        adapters=tuple(_stored(row, tags.get(row.job_id, []), ancestors.get(row.job_id)) for row in rows),
        after=rows[0].job_id if len(found) > len(rows) else None,
        now=store.now(),
    )


def lineage(store: Store, artifacts: ArtifactStore, text: str) -> Lineage:
    """Where a named adapter comes from. Raises what `stored_adapter` raises, and ArtifactError."""
    adapter, job = stored_adapter(store, text)
    stored = result_binding(store, job)
    report = artifacts.read_report(stored)
    bound = stored.manifest_sha256 is not None
    return Lineage(adapter=adapter, user=job.user, spec=job.spec, report=report, now=store.now(), bound=bound)


def stored_adapter(store: Store, text: str) -> tuple[StoredAdapter, Job]:
    """A named adapter, and its job.

    Raises UsageError for a text that is not a name, AdapterNotFound; WrongState, with the reason, for a job without an
    adapter.
    """
    row = store.adapters.get(parse_reference(text))
    number = row.job_id
    adapter = _stored(
        row, store.adapters.tags([number]).get(number, []), store.adapters.ancestors([number]).get(number)
    )
    return adapter, store.jobs.get(number)


def pull_adapter(artifacts: ArtifactStore, stored: Binding, job_id: int, folder: Path) -> Manifest:
    """Copy an adapter's files, verified, into a new folder that peft can load.

    Raises UsageError for a folder that can't be created, ArtifactError.
    """
    check_adapter_config(artifacts.read_bytes(stored, f"adapter/{CONFIG}"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} can't be made: {error.strerror}") from error
    files = artifacts.pull(stored, "adapter/", folder)
    check_adapter_weights(folder / WEIGHTS.removeprefix("adapter/"), job_id)
    return files


def check_new(folder: Path) -> None:
    """Raises UsageError for a folder that is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "name a new folder")


def results_to_bind(store: Store, names: Sequence[str]) -> list[int]:
    """The jobs whose results are not bound yet, among the named adapters or all. Raises what `stored_adapter`
    raises."""
    if not names:
        return [job.job_id for job in store.results.not_bound()]
    jobs = {job.job_id: job for _, job in (stored_adapter(store, name) for name in names)}.values()
    return [job.job_id for job in jobs if job.manifest_sha256 is None]


def bind_result(store: Store, artifacts: ArtifactStore, user: str, job_id: int) -> None:
    """Bind a result, as it is now, to its row. Raises ArtifactError when it does not match its manifest or its row."""
    stored = artifacts.bound(result_binding(store, store.jobs.get(job_id)))
    assert stored.manifest_sha256 is not None
    store.results.bind(job_id, stored.manifest_sha256, user)


def _stored(row: Adapter, tags: list[str], init_from: int | None) -> StoredAdapter:
    columns = {column.key: getattr(row, column.key) for column in row.__table__.columns}
    return StoredAdapter(**columns, tags=tuple(tags), init_from=init_from)
