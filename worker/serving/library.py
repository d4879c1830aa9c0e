"""The stored adapters as a box uses them: found by name, fetched once, verified."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loractl.common.adapter_config import CONFIG, check_adapter_weights
from loractl.common.artifacts import ArtifactStore, Binding, attempt_prefix, sha256_of
from loractl.common.errors import ArtifactError, UsageError
from loractl.common.fingerprint import changed_files
from loractl.common.job.method import Method
from loractl.common.job.names import parse_reference
from loractl.common.job.sections import DataFormat
from loractl.common.job.spec import JobSpec
from loractl.common.lab_store import open_lab_store
from loractl.common.memory.correction import LEAN
from loractl.common.settings import Settings
from loractl.common.store.columns import word
from loractl.common.store.database import connect, reachable
from loractl.common.store.store import Store
from loractl.common.store.tables import Adapter, Job
from loractl.worker.base.adapter import WEIGHTS
from loractl.worker.base.source import identify
from loractl.worker.protocol.trust import check_base, may_run_code


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How the base computes: in NF4 or not, and the number format that a job asks for."""

    method: Method = Method.LORA
    dtype: str = "auto"  # training.dtype: of NF4's products, or of the whole base
    exact: bool = False  # what is not in NF4 is in fp32, as in peft's recipe, and not in 16 bit

    def __str__(self) -> str:
        if self.method is Method.QLORA:
            rest = ", all else in fp32" if self.exact else ""
            return ("NF4" if self.dtype == "auto" else f"NF4 with {self.dtype}") + rest
        return f"dtype {self.dtype}"

    def on(self, device: str) -> Arithmetic:
        """On a CPU, which has no float16, its own format replaces that."""
        return replace(self, dtype="auto") if (self.dtype, device) == ("float16", "cpu") else self


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An adapter in the store, and the job that made it."""

    job_id: int
    attempt: int
    name: str
    method: Method
    size: int  # bytes of its files
    created: int  # unix seconds
    spec: JobSpec
    data: dict[str, Any]  # the job's stored data sets: {"path": {"uri", "sha256"}, ...}
    stored: Binding
    exact: bool = False  # its training used exact steps

    @property
    def base(self) -> tuple[str, str | None]:
        """Adapters with the same value can be on one loaded base."""
        return self.spec.base_model, self.spec.revision

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of its training, and so of its report."""
        exact = self.exact and self.method is Method.QLORA
        return Arithmetic(method=self.method, dtype=self.spec.training.dtype, exact=exact)


class Library:
    """Finds adapters and brings them to this box."""

    def __init__(self, settings: Settings, tell: Callable[[str], None] | None = None) -> None:
        """`tell` gets a sentence about a result that is not bound to its row; without it, that is logged."""
        self.settings = settings
        with reachable(settings):
            self.store = Store(connect(settings))
        self._artifacts: ArtifactStore = open_lab_store(settings, self.store, tell)
        self._fetched: dict[tuple[int, int], Path] = {}  # verified by this process

    def find(self, text: str) -> Listed:
        """The named adapter, which must write text. Raises UsageError, JobNotFound, AdapterNotFound, Refused."""
        listed = self.find_any(text)
        if not listed.spec.kind.writes:
            raise UsageError(
                f"{listed.name} (job {listed.job_id}) is a classifier, which writes no text",
                f"loractl predict {listed.job_id} FILE names the label of each row",
            )
        return listed

    def find_any(self, text: str) -> Listed:
        """The named adapter, which may be a classifier. Raises UsageError, JobNotFound, AdapterNotFound, Refused."""
        row = self.store.adapters.get(parse_reference(text))
        return self._listed(row, self.store.jobs.get(row.job_id))

    def on(self, base: str, revision: str | None) -> dict[str, Listed]:
        """The stored adapters of a base by job number and by every name and tag that they have."""
        tags, known = self.store.adapters.tags(), {}
        for row in self.store.adapters.all():
            if row.base_model != base:
                continue
            listed = self._listed(row, self.store.jobs.get(row.job_id))
            if listed.spec.revision != revision or not listed.spec.kind.writes:
                continue
            known[str(row.job_id)] = listed
            for tag in tags.get(row.job_id, ()):
                known[f"{row.name}:{tag}"] = listed
        return known

    def _listed(self, row: Adapter, job: Job) -> Listed:
        spec = JobSpec.model_validate(job.spec)
        check_base(spec.base_model, self.settings.model_roots)
        engines = {attempt.attempt: attempt.engine for attempt in self.store.attempts.of_job(row.job_id)}
        return Listed(
            job_id=row.job_id,
            attempt=row.attempt,
            name=row.name,
            method=word(Method, row.method),
            size=row.size,
            created=int(row.created_at.timestamp()),
            spec=spec,
            data=job.data,
            stored=Binding(
                prefix=attempt_prefix(row.job_id, row.attempt),
                manifest_sha256=job.manifest_sha256,
                weights_sha256=row.sha256,
            ),
            exact=spec.training.exact or engines.get(row.attempt, LEAN) < LEAN,
        )

    def fetch(self, adapter: Listed) -> Path:
        """The folder with its files on this box, verified by its manifest. Raises ArtifactError, ServiceUnreachable."""
        known = self._fetched.get((adapter.job_id, adapter.attempt))
        if known is not None and (known / WEIGHTS).is_file() and (known / CONFIG).is_file():
            return known
        folder = self._fetched[adapter.job_id, adapter.attempt] = self._fetch(adapter)
        return folder

    def _fetch(self, adapter: Listed) -> Path:
        wanted = {
            name.removeprefix("adapter/"): file
            for name, file in self._artifacts.manifest(adapter.stored).items()
            if name.startswith("adapter/")
        }
        if not {CONFIG, WEIGHTS} <= wanted.keys():
            raise ArtifactError(f"the result of job {adapter.job_id} holds no adapter")
        folder = self.settings.cache_dir / "adapters" / f"{adapter.job_id}-{wanted[WEIGHTS].sha256[:16]}"
        if folder.is_dir():
            if all((folder / name).is_file() and sha256_of(folder / name) == f.sha256 for name, f in wanted.items()):
                os.utime(folder)  # loractl gc removes folders that were not used for a long time
                return folder
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
        try:
            self._artifacts.pull(adapter.stored, "adapter/", aside)
            check_adapter_weights(aside / WEIGHTS, adapter.job_id)
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first; the content is the same
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    def report(self, adapter: Listed) -> dict[str, Any]:
        """The report of the job that made it."""
        return self._artifacts.read_report(adapter.stored)

    @functools.cache  # noqa: B019  a library lives as long as its process
    def _format(self, stored: Binding) -> DataFormat:
        return DataFormat(self._artifacts.read_report(stored)["data"]["format"])

    def format(self, adapter: Listed) -> DataFormat:
        """The format of its training rows: whether its prompts are conversations or plain text."""
        return self._format(adapter.stored)

    def data_file(self, adapter: Listed, key: str) -> str | None:
        """The path of a data set that its job read: on this box for a stored one, a hub id for others."""
        named = adapter.spec.data_sets().get(key)
        stored = adapter.data.get(key)
        if stored is None:
            return named
        folder = self.settings.cache_dir / "datasets"
        return str(self._artifacts.fetch_dataset(stored["uri"], stored["sha256"], folder))

    def before(self, adapter: Listed) -> Iterator[Listed]:
        """Those from which it was begun, the last one first, with their jobs' specs and data alone: their files may be
        gone. Raises JobNotFound."""
        number = adapter.job_id
        while (ancestor := self.store.adapters.ancestors([number]).get(number)) is not None:
            job = self.store.jobs.get(number := ancestor)
            yield replace(adapter, job_id=number, spec=JobSpec.model_validate(job.spec), data=job.data)

    def revision(self, adapter: Listed) -> str | None:
        """The revision of the base to load; if the job named none for a hub id, the commit of its training."""
        if adapter.spec.revision is not None or Path(adapter.spec.base_model).is_absolute():
            return adapter.spec.revision
        commit = (self.report(adapter).get("base") or {}).get("commit")
        return None if commit is None else str(commit)

    def changed_base(self, adapter: Listed) -> list[str]:
        """Files of the base on this box that differ from those the adapter was trained on; empty if its report predates
        file hashes."""
        trained = (self.report(adapter).get("base") or {}).get("files")
        if not trained:
            return []
        here = identify(adapter.spec.base_model, self.revision(adapter), self.settings.cache_dir)["files"]
        return changed_files(trained, here)

    def warnings_about(self, adapters: Sequence[Listed]) -> list[str]:
        """A sentence for each adapter trained on other files of its base than this box has."""
        changed = [(adapter, files) for adapter in adapters if (files := self.changed_base(adapter))]
        return [
            f"{adapter.name} (job {adapter.job_id}) was trained on other files of its base: {', '.join(files)}"
            for adapter, files in changed
        ]

    def may_run_code(self, adapter: Listed) -> bool:
        """Whether this box's owner trusts the base's own code."""
        return may_run_code(adapter.spec, self.settings)


def usual_arithmetic(adapters: Sequence[Listed], *, in_4bit: bool | None = None, dtype: str = "auto") -> Arithmetic:
    """The arithmetic in which most of the adapters were trained, on a tie the first one's; a person's choice overrides
    it (`in_4bit`, and a `dtype` other than auto)."""
    counted = Counter(adapter.arithmetic for adapter in adapters).most_common(1)
    usual = counted[0][0] if counted else Arithmetic()
    if in_4bit is not None:
        usual = replace(usual, method=Method.QLORA if in_4bit else Method.LORA, exact=usual.exact and in_4bit)
    return usual if dtype == "auto" else replace(usual, dtype=dtype)


def same_base(adapters: list[Listed]) -> tuple[str, str | None]:
    """Their common base. Raises UsageError."""
    first = adapters[0]
    for other in adapters[1:]:
        if other.base != first.base:
            raise UsageError(
                f"{other.name} (job {other.job_id}) is for another base than {first.name} (job {first.job_id})",
                f"one loaded base serves one: {first.spec.base_model} or {other.spec.base_model}",
            )
    return first.base
