"""A lab, its jobs, their reports and adapters, for scripts and notebooks."""

from __future__ import annotations

import html
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.binding import result_binding
from loractl.common.errors import UsageError
from loractl.common.job.file import load_spec, spec_of
from loractl.common.job.status import Status
from loractl.common.settings import Settings
from loractl.common.store.records import Choice, Page
from loractl.common.store.store import Store
from loractl.common.text import clean_line
from loractl.scheduler.adapters.answer import StoredAdapter, check_new, pull_adapter, stored_adapter
from loractl.scheduler.cli.named import job_named
from loractl.scheduler.cli.session import open_artifacts, open_session
from loractl.scheduler.report.answer import EvaluationReport, report
from loractl.scheduler.status.follow import POLL_S, change_line, is_over
from loractl.scheduler.status.job import JobState, job_log, job_state
from loractl.scheduler.submit.admission import queue_all
from loractl.scheduler.submit.draft import JobDraft
from loractl.scheduler.submit.preflight import check_addresses


class Lab:
    """The lab that the settings name, as the commands find it. Warnings go to stderr, as the commands' do."""

    def __init__(self) -> None:
        """Raises UsageError, ServiceUnreachable, SchemaMismatch."""
        check_addresses()
        self._settings, self._store = open_session()

    def submit(self, job: str | Path | Mapping[str, Any], /, **changes: Any) -> LabJob:
        """Queue a job, given as a job file or as a mapping with a job file's keys.

        `changes`: keys to set, a section as a mapping: lora={"r": 32}. Raises LoractlError for what submit refuses.
        """
        overrides = [f"{key}={_written(value)}" for key, value in _flat("", changes)]
        if isinstance(job, Mapping):
            draft = JobDraft(spec=spec_of(json.loads(_written(job)), overrides))
        else:
            draft = JobDraft(spec=load_spec(Path(job), overrides), job_file=Path(job))
        (entry,) = queue_all([draft], self._settings, self._store, self._artifacts(), tell=str)
        return self.job(entry.job_id)

    def job(self, name: int | str) -> LabJob:
        """A job by number, name or tag. Raises JobNotFound, AdapterNotFound, UsageError."""
        job_id = job_named(self._store, str(name))
        self._store.jobs.get(job_id)
        return LabJob(job_id, self._settings, self._store, self._artifacts)

    def jobs(self, *, limit: int = 50, user: str | None = None, name: str | None = None) -> list[LabJob]:
        """The newest jobs, the newest first; `user`, `name`: only such jobs."""
        rows = self._store.jobs.newest(Choice(user=user, name=name), Page(limit=limit))
        return [LabJob(row.job_id, self._settings, self._store, self._artifacts) for row in rows[:limit]]

    def __repr__(self) -> str:
        return f"<loractl lab of {self._settings.user}>"

    def _artifacts(self) -> ArtifactStore:
        return open_artifacts(self._settings, self._store)


class LabJob:
    """A job. Its state is read when it is asked for."""

    def __init__(
        self, job_id: int, settings: Settings, store: Store, open_artifacts: Callable[[], ArtifactStore]
    ) -> None:
        self.job_id = job_id
        self._settings, self._store, self._open_artifacts = settings, store, open_artifacts

    @property
    def state(self) -> JobState:
        """All that status shows of the job. Raises JobNotFound."""
        return job_state(self._store, self.job_id)

    @property
    def status(self) -> str:
        """queued, running, succeeded, failed or cancelled. Raises JobNotFound."""
        return self.state.status.value

    @property
    def log(self) -> str:
        """What all of its attempts have printed so far. Raises JobNotFound, ArtifactError."""
        return job_log(self._store, self._open_artifacts, self.job_id).text

    @property
    def report(self) -> LabReport:
        """What it measured, base against tuned. Raises WrongState while it has no result, ArtifactError."""
        return LabReport(report(self._store, self._open_artifacts(), self.job_id, self._settings.user))

    @property
    def adapter(self) -> LabAdapter:
        """Its stored adapter. Raises WrongState, with the reason, for a job without one; AdapterNotFound."""
        stored, row = stored_adapter(self._store, str(self.job_id))
        return LabAdapter(stored, lambda folder: self._pull(row, folder))

    def wait(self, timeout: float | None = None) -> None:
        """Follow the job until it has ended, or until it is held: then only a person lets it go on.

        In a notebook its table is redrawn, elsewhere each change is a line on stderr. It returns nothing, which a cell
        would draw below. `timeout`: seconds. Raises TimeoutError, JobNotFound.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        show, shown = _screen(), ""
        while True:
            state = self.state
            if (line := change_line(self._store, state)) != shown:
                show(line, self)
                shown = line
            if is_over(self._store, state):
                return
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {self.job_id} has not ended within {timeout:g} s: {line}")
            time.sleep(POLL_S)

    def cancel(self) -> LabJob:
        """End the job while it waits, or ask its trainer to stop. Raises JobNotFound, NotYours, WrongState."""
        self._store.jobs.cancel(self.job_id, self._settings.user)
        return self

    def _pull(self, row: Any, folder: Path) -> None:
        pull_adapter(self._open_artifacts(), result_binding(self._store, row), self.job_id, folder)

    def __repr__(self) -> str:
        return f"<{change_line(self._store, self.state)}>"

    def _repr_html_(self) -> str:
        """A notebook's view of the job."""
        state = self.state
        told = {
            "job": f"{state.job_id} {state.name}",
            "status": state.status.value,
            "on": state.where if state.status is Status.RUNNING else "",
            "step": f"{state.step} of {state.total_steps}" if state.total_steps and state.step is not None else "",
            "loss": "" if state.loss is None else f"{state.loss:.2f}",
            "": state.message or "",
        }
        return _table({name: text for name, text in told.items() if text})


class LabReport:
    """An evaluation report."""

    def __init__(self, found: EvaluationReport) -> None:
        self._found = found

    @property
    def content(self) -> dict[str, Any]:
        """report.json, as docs/results.md explains it, with the looks at its final rows."""
        content: dict[str, Any] = self._found.as_json()
        return content

    @property
    def verdict(self) -> str:
        """Its reading, a key of `common.verdict.BADGES`: better, better_by_loss, worse and others."""
        return str(self._found.content["verdict"]["reading"])

    @property
    def sentence(self) -> str:
        """The verdict in a sentence, with what it rests on."""
        return str(self._found.content["verdict"]["sentence"])

    def __repr__(self) -> str:
        return f"<report of job {self._found.job_id}: {self.sentence}>"

    def _repr_html_(self) -> str:
        aside = self._found.content["verdict"].get("aside")
        return _table({"job": str(self._found.job_id), "verdict": self.sentence, **({"": aside} if aside else {})})


class LabAdapter:
    """A stored adapter."""

    def __init__(self, stored: StoredAdapter, pull: Callable[[Path], None]) -> None:
        self.stored = stored  # where it comes from: base model, method, size, hash, tags
        self._pull = pull

    def pull(self, folder: str | Path) -> Path:
        """Copy its files, verified, into a new folder, which peft's PeftModel.from_pretrained loads.

        Raises UsageError for a folder that is not empty or can't be made, ArtifactError.
        """
        check_new(Path(folder))
        self._pull(Path(folder))
        return Path(folder)

    def __repr__(self) -> str:
        return f"<adapter of job {self.stored.job_id} on {clean_line(self.stored.base_model)}>"


def _flat(section: str, changes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys of a job file, like lora.r, and their values."""
    found: list[tuple[str, Any]] = []
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and value
        found += _flat(f"{section}{key}.", value) if inner else [(f"{section}{key}", value)]
    return found


def _written(value: Any) -> str:
    """A value as a job file may have it. Raises UsageError."""

    def plain(other: object) -> str:
        if isinstance(other, Path):
            return str(other)
        raise UsageError(f"{other!r} is no value of a job file", "a number, a text, a path, a list or a mapping")

    return json.dumps(value, ensure_ascii=False, default=plain)


def _screen() -> Callable[[str, LabJob], None]:
    """Shows a change of a job: in a notebook in place, elsewhere as a line."""
    shell = sys.modules.get("IPython")
    if shell is None or getattr(shell.get_ipython(), "kernel", None) is None:
        return lambda line, _: print(line, file=sys.stderr, flush=True)  # noqa: T201  the notebook's or script's own
    from IPython.display import display

    handle: list[Any] = []

    def redraw(_: str, job: LabJob) -> None:
        if handle:
            handle[0].update(job)
        else:
            handle.append(display(job, display_id=True))

    return redraw


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(clean_line(text))}</td></tr>"
        for name, text in rows.items()
    )
    return f"<table>{cells}</table>"
