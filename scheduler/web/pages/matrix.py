"""The stored adapters by their measures: a row per adapter, a column per measure, grouped by base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loractl.common.errors import ArtifactError, LoractlError
from loractl.common.store.records import Page
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.scheduler.adapters.answer import AdapterList, StoredAdapter, adapter_list

from .shelf import UNREADABLE, ReportDigest, ReportedChange, ReportShelf, digest

COLUMNS = 7
"""Measures with a column; the others are in the adapter's own report."""

REPORT_WAIT_S = 1.0

_FIRST = ("loss", "preference_accuracy", "accuracy", "exact_match", "rougeL", "macro_f1")

_SAID_BY_LOSS = "perplexity"
"""e to the loss: another number for the same change, and up to six digits wide."""


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """An adapter, who made it, and its changes by the measure's name and label: a loss on pairs is another measure than
    a loss on tokens."""

    adapter: StoredAdapter
    user: str
    changes: Mapping[tuple[str, str], ReportedChange]
    told: str | None  # why no change is known; None: some are


@dataclass(frozen=True, kw_only=True)
class AdapterOrigin:
    """The origin of one adapter."""

    row: AdapterRow
    settings: Mapping[str, Any]  # of its job: revision, lora, dataset
    data: Mapping[str, Any]  # of its report: format, sha256, rows; empty until that is read
    sentence: str


@dataclass(frozen=True, kw_only=True)
class AdapterMatrix:
    """A page of the stored adapters."""

    listed: AdapterList
    measures: tuple[tuple[str, str, str], ...]  # name, label, unit of each column
    bases: tuple[tuple[str, tuple[AdapterRow, ...]], ...]
    tones: frozenset[str]  # better, worse, same: those in a cell
    chosen: AdapterOrigin | None


def adapter_matrix(store: Store, shelf: ReportShelf, page: Page, chosen: int | None = None) -> AdapterMatrix:
    """The page's adapters by base model, and the origin of the chosen one (a job), if it is among them."""
    listed = adapter_list(store, page)
    rows, found = [], None
    jobs = store.jobs.numbered([adapter.job_id for adapter in listed.adapters])
    for job in jobs.values():
        shelf.known(job.job_id, job.manifest_sha256)
    patience = REPORT_WAIT_S
    for adapter in reversed([adapter for adapter in listed.adapters if adapter.job_id in jobs]):
        job = jobs[adapter.job_id]
        report, told = _read(shelf, job, patience)
        if report is None:
            patience = 0.0
        row, content = _row(adapter, job, report, told)
        rows.append(row)
        if adapter.job_id == chosen:
            found = _origin(row, job, report or {}, content)
    measures = _measures(rows)
    bases = dict.fromkeys(row.adapter.base_model for row in rows)
    return AdapterMatrix(
        listed=listed,
        measures=measures,
        tones=frozenset(c.tone for row in rows for key, c in row.changes.items() if key in {m[:2] for m in measures}),
        bases=tuple((base, tuple(row for row in rows if row.adapter.base_model == base)) for base in bases),
        chosen=found,
    )


def _read(shelf: ReportShelf, job: Job, patience: float) -> tuple[dict[str, Any] | None, str | None]:
    try:
        report = shelf.report(job.job_id, job.manifest_sha256, wait_s=patience)
    except LoractlError as error:
        return None, error.sentence
    return report, "its report is still being read" if report is None else None


def _row(
    adapter: StoredAdapter, job: Job, report: dict[str, Any] | None, told: str | None
) -> tuple[AdapterRow, ReportDigest | None]:
    content = None
    if report is not None:
        try:
            content = digest(report)
        except ArtifactError as error:
            told = error.sentence
    changes = (
        {}
        if content is None
        else {(change.name, change.label): change for change in (*content.changes, *content.harness)}
    )
    return AdapterRow(adapter=adapter, user=job.user, changes=changes, told=told), content


def _measures(rows: list[AdapterRow]) -> tuple[tuple[str, str, str], ...]:
    """The measures that most adapters have, the usual ones first."""
    known = {key: change for row in rows for key, change in row.changes.items() if key[0] != _SAID_BY_LOSS}
    count = {key: sum(key in row.changes for row in rows) for key in known}
    usual = {name: place for place, name in enumerate(_FIRST)}
    order = sorted(known, key=lambda key: (usual.get(key[0], len(usual)), -count[key], key))[:COLUMNS]
    return tuple((*key, known[key].unit) for key in order)


def _origin(row: AdapterRow, job: Job, report: Mapping[str, Any], content: ReportDigest | None) -> AdapterOrigin:
    try:
        told = report["data"]
        data = {key: told[key] for key in ("format", "train_rows", "held_out_rows")}
        data |= {"final_rows": told.get("final_rows"), "hashes": [told["sha256"], *told.get("more_sha256", ())]}
    except UNREADABLE:
        data = {}
    return AdapterOrigin(
        row=row,
        settings={key: job.spec.get(key) for key in ("revision", "lora", "dataset")},
        data=data,
        sentence="" if content is None else content.sentence,
    )
