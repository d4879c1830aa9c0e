"""The reports of finished jobs, kept once read: a result never changes, and its store may be slow or down.

What a report says are values that a page can rely on: a worker wrote it, and may have been someone else's.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillReading
from dataclasses import dataclass
from typing import Any

from loractl.common.artifacts import REPORT, ArtifactStore, split_final
from loractl.common.chart import forest
from loractl.common.errors import ArtifactError, LoractlError
from loractl.common.store.store import Store
from loractl.common.verdict import RIGHT, Written, answer_groups, rights, word, written
from loractl.scheduler.report.answer import result_of

KEPT = 200
"""Reports that are kept."""

LARGEST = 16 * 2**20
"""Most bytes of a result's file that is read for a page; a loractl report has a few hundred KiB."""

AGAIN_S = 30.0
"""How long until an unreadable report is requested again."""

READERS = 4


@dataclass(frozen=True, kw_only=True)
class _Report:
    shown: dict[str, Any]
    final: dict[str, Any] | None  # of final rows


class ReportShelf:
    """Reads reports in the background, so that no page waits long for the artifact store."""

    def __init__(self, store: Store, open_artifacts: Callable[[], ArtifactStore]) -> None:
        self._store, self._open = store, open_artifacts
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="report")
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[float, str | None, Future[_Report]]] = OrderedDict()
        self._artifacts: ArtifactStore | None = None

    def report(self, job_id: int, stamp: str | None, wait_s: float = 0.0) -> dict[str, Any] | None:
        """A finished job's report; None while it is being read. Raises LoractlError if it can't be.

        `stamp`: its row's manifest_sha256; a different one means a different result.
        """
        found = self._asked(job_id, stamp)
        try:
            return found.result(timeout=wait_s).shown
        except StillReading:
            return None

    def final(self, job_id: int) -> dict[str, Any] | None:
        """What a report already read says about final rows. Only for pages that show a look already taken."""
        with self._lock:
            entry = self._kept.get(job_id)
        done = entry is not None and entry[2].done() and entry[2].exception() is None
        return entry[2].result().final if entry is not None and done else None

    def known(self, job_id: int, stamp: str | None) -> dict[str, Any] | None:
        """The report if already read; otherwise it is requested, and no error is reported."""
        try:
            return self.report(job_id, stamp)
        except LoractlError:
            return None

    def stored_log(self, job_id: int) -> str:
        """The log stored with a result. Raises LoractlError."""
        return self._read_file(job_id, "log.txt").decode(errors="replace")

    def _asked(self, job_id: int, stamp: str | None) -> Future[_Report]:
        now = time.monotonic()
        with self._lock:
            entry = self._kept.get(job_id)
            if entry is not None and entry[1] == stamp and not self._failed(entry[2], now - entry[0]):
                self._kept.move_to_end(job_id)
                return entry[2]
            reading = self._readers.submit(self._read, job_id)
            self._kept[job_id] = now, stamp, reading
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return reading

    @staticmethod
    def _failed(reading: Future[_Report], age: float) -> bool:
        return reading.done() and reading.exception() is not None and age > AGAIN_S

    def _read(self, job_id: int) -> _Report:
        try:
            content = json.loads(self._read_file(job_id, REPORT))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ArtifactError(f"the report of job {job_id} is not loractl's")
        shown, final = split_final(content)
        return _Report(shown=shown, final=final)

    def _read_file(self, job_id: int, name: str) -> bytes:
        artifacts = self._artifacts = self._artifacts or self._open()
        _, stored = result_of(self._store, job_id)
        file = artifacts.manifest(stored).get(name)
        if file is not None and file.size > LARGEST:
            raise ArtifactError(f"{name} of job {job_id} is too large for a page: {file.size} bytes")
        return artifacts.read_bytes(stored, name)


UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What a malformed report raises when its parts are read."""


@dataclass(frozen=True, kw_only=True)
class ReportedChange:
    """One metric of a report: base against tuned."""

    name: str
    label: str
    unit: str
    cases: int
    higher_is_better: bool
    shown: Written
    low: float | None  # ends of the interval and its middle on an axis of 0..100, the base at 50
    change: float
    high: float | None

    @property
    def tone(self) -> str:
        """better, worse, or same."""
        return self.shown.reading if self.shown.reading in ("better", "worse") else "same"


@dataclass(frozen=True, kw_only=True)
class AnswerGroup:
    """The answers to held-out rows that changed in one way."""

    key: str
    title: str
    answers: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class ReportDigest:
    """A report as a page shows it."""

    reading: str
    sentence: str
    aside: str
    warnings: tuple[str, ...]  # of the data
    rows: int
    samples: int
    seed: int
    changes: tuple[ReportedChange, ...]
    harness: tuple[ReportedChange, ...]  # of the lm-eval harness
    groups: tuple[AnswerGroup, ...]

    @property
    def word(self) -> str:
        """The verdict's word, as `status` and the report have it."""
        return word(self.reading)

    @property
    def tone(self) -> str:
        """better, worse, or same."""
        return self.reading if self.reading in ("better", "worse") else "same"

    @property
    def main(self) -> ReportedChange:
        """The held-out loss."""
        return next((change for change in self.changes if change.name == "loss"), self.changes[0])


def digest(report: Mapping[str, Any]) -> ReportDigest:
    """The parts of a report that a page shows. Raises ArtifactError for a malformed report."""
    try:
        return _digest(report)
    except UNREADABLE as error:
        raise ArtifactError(f"its report has another form than loractl's ({type(error).__name__})") from error


def _digest(report: Mapping[str, Any]) -> ReportDigest:
    evaluation, verdict = report["evaluation"], report["verdict"]
    return ReportDigest(
        reading=str(verdict["reading"]),
        sentence=str(verdict["sentence"]),
        aside=str(verdict.get("aside") or ""),
        warnings=tuple(map(str, (report.get("data") or {}).get("warnings") or ())),
        rows=int(evaluation["rows"]),
        samples=int(evaluation["bootstrap"]["samples"]),
        seed=int(evaluation["bootstrap"]["seed"]),
        changes=_changes(evaluation["metrics"]),
        harness=_changes([{**m, "name": m["label"]} for m in (evaluation.get("lm_eval") or {}).get("metrics", ())]),
        groups=tuple(
            AnswerGroup(key=key, title=title, answers=tuple(map(_answer, answers)))
            for key, title, answers in answer_groups(evaluation["answers"])
        ),
    )


def _changes(metrics: list[dict[str, Any]]) -> tuple[ReportedChange, ...]:
    places = forest(metrics)
    return tuple(
        ReportedChange(
            name=str(m["name"]),
            label=str(m["label"]),
            unit=str(m.get("unit") or ""),
            cases=int(m["cases"]),
            higher_is_better=bool(m["higher_is_better"]),
            shown=written({"unit": "", **m}),
            low=None if m["low"] is None else _inside(places[m["name"]]["low"]),
            change=_inside(places[m["name"]]["change"]),
            high=None if m["high"] is None else _inside(places[m["name"]]["high"]),
        )
        for m in metrics
    )


def _inside(place: float) -> float:
    return round(min(100.0, max(0.0, float(place))), 1)


def _answer(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    texts = {key: str(answer[key]) for key in ("prompt", "expected", "base", "tuned")}
    ended = {key: bool(answer[key]) for key in ("base_ended", "tuned_ended")}
    rejected = None if answer.get("rejected") is None else str(answer["rejected"])
    said = {key: RIGHT[found] for key, found in zip(("base", "tuned"), rights(answer), strict=True)}
    return {"row": int(answer["row"]), **texts, **ended, "said": said, "rejected": rejected}
