"""The artifact store: data sets by content hash, and what jobs store by attempt.

A result is written under jobs/<id>/attempt-<n>/ and closed by manifest.json, which names every file with its size and
sha256. What has no manifest does not count as stored. Names are made here, never from what a person typed.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError, ServiceUnreachable
from .files import open_files
from .settings import Settings, redacted

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")

_HOLDING = re.compile(
    r"(jobs/[1-9]\d{0,17}/(?:attempt-[1-9]\d{0,8}|checkpoints)|datasets/[0-9a-f]{64}(?:\.\w{1,16})?(?:\.part-\d+)?)"
    r"(?:/.*)?",
    re.ASCII | re.DOTALL,
)
"""The names that are made here. Nothing else is listed or removed."""


_CHECKPOINT = re.compile(r"(jobs/[1-9]\d{0,17}/checkpoints/([1-9]\d{0,8})-\d{1,12})/", re.ASCII)
"""Where a job's checkpoint lies, and the attempt that wrote it."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a manifest."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What the store holds under one name: an attempt's files, a job's checkpoints, or a data set."""

    name: str
    size: int  # bytes
    changed_at: dt.datetime  # of its newest file


Manifest = dict[str, StoredFile]
"""Relative path -> file."""


class ArtifactStore:
    """Files under one URL, file:// or s3://."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files = open_files(self.url)

    def put_dataset(self, path: Path) -> tuple[str, str]:
        """Upload a data set under its content hash, once. Returns (uri, sha256)."""
        digest = sha256_of(path)
        name = f"datasets/{digest}{path.suffix.lower()}"
        with self._errors(f"storing {path.name}"):
            if not self._files.exists(name) or self._files.hash(name) != digest:
                self._files.put(path, name)
            else:
                self._files.refresh(path, name)
        return f"{self.url}/{name}", digest

    def fetch_dataset(self, uri: str, sha256: str, folder: Path) -> Path:
        """Download a data set into `folder` unless it is there; its content must match the hash.

        Raises ArtifactError, also for a name that put_dataset can't have made: others may have written the row.
        """
        name = uri.removeprefix(self.url + "/")
        if not re.fullmatch(rf"datasets/{re.escape(sha256)}\.[a-z]{{1,8}}", name) or not _SHA256.fullmatch(sha256):
            raise ArtifactError(f"{uri!r} is no data set of this store", "submit the job again")
        target = folder / Path(name).name
        if target.exists() and sha256_of(target) == sha256:
            os.utime(target)  # loractl gc removes what was not used for long
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with self._errors(f"fetching {uri}"):
            self._files.get(name, target)
        if sha256_of(target) != sha256:
            target.unlink()
            raise ArtifactError(f"{uri} does not have the content that was submitted", "submit the job again")
        return target

    def put_result(self, folder: Path, prefix: str) -> Manifest:
        """Upload every file below `folder` under `prefix`, close it with a manifest and read all of it back.

        Raises ArtifactError when something can't be written or reads back differently, ServiceUnreachable.
        """
        paths = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
        if wrong := next((p for p in paths if p.is_symlink() or not p.is_file()), None):
            # a link would be followed, and its target stored under the job's name
            raise ArtifactError(f"storing {prefix}: {wrong.relative_to(folder).as_posix()!r} is not a plain file")
        files = {_inside(p.relative_to(folder).as_posix()): p for p in paths}
        manifest = {name: StoredFile(size=p.stat().st_size, sha256=sha256_of(p)) for name, p in files.items()}
        with self._errors(f"storing {prefix}"):
            for name, path in files.items():
                self._files.put(path, f"{prefix}/{name}")
            text = json.dumps({name: vars(file) for name, file in manifest.items()}, indent=1)
            self._files.write(f"{prefix}/{MANIFEST}", text.encode())
        self.verify(prefix, manifest)
        return manifest

    def manifest(self, prefix: str) -> Manifest:
        """The manifest that closes `prefix`. Raises ArtifactError without one."""
        with self._errors(f"reading {prefix}"):
            try:
                raw = json.loads(self._files.read(f"{prefix}/{MANIFEST}"))
            except FileNotFoundError:
                raise ArtifactError(f"{self.url}/{prefix} has no manifest: nothing was stored there") from None
            except ValueError:
                raw = None
        try:
            manifest = {_inside(name): _checked(StoredFile(**file)) for name, file in raw.items()}
        except (AttributeError, TypeError, ValueError, ArtifactError):
            raise ArtifactError(f"the manifest of {self.url}/{prefix} is damaged") from None
        return manifest

    def verify(self, prefix: str, expected: Manifest | None = None) -> Manifest:
        """Read every file below `prefix` back and compare it with its manifest. Raises ArtifactError."""
        manifest = self.manifest(prefix)
        if expected is not None and manifest != expected:
            raise ArtifactError(f"the manifest of {prefix} reads back differently")
        with self._errors(f"verifying {prefix}"):
            for name, file in manifest.items():
                if self._files.hash(f"{prefix}/{name}") != file.sha256:
                    raise ArtifactError(f"{self.url}/{prefix}/{name} does not match its manifest")
        return manifest

    def pull(self, prefix: str, part: str, target: Path) -> Manifest:
        """Copy the files of `prefix` that begin with `part` into `target`, verified, under the rest of their names."""
        wanted = {name: file for name, file in self.manifest(prefix).items() if name.startswith(part)}
        if not wanted:
            raise ArtifactError(f"{self.url}/{prefix} has no {part}")
        for name, file in wanted.items():
            path = target / name.removeprefix(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._errors(f"fetching {name}"):
                self._files.get(f"{prefix}/{name}", path)
            if sha256_of(path) != file.sha256:
                raise ArtifactError(f"{self.url}/{prefix}/{name} does not match its manifest")
        return {name.removeprefix(part): file for name, file in wanted.items()}

    def read_json(self, prefix: str, name: str) -> Any:
        """A JSON file of a result, checked against the manifest."""
        return json.loads(self.read_bytes(prefix, name))

    def read_bytes(self, prefix: str, name: str) -> bytes:
        """A small file of a result, checked against the manifest."""
        file = self.manifest(prefix).get(name)
        if file is None:
            raise ArtifactError(f"{self.url}/{prefix} has no {name}")
        with self._errors(f"reading {name}"):
            raw = self._files.read(f"{prefix}/{name}")
        if hashlib.sha256(raw).hexdigest() != file.sha256:
            raise ArtifactError(f"{self.url}/{prefix}/{name} does not match its manifest")
        return raw

    def holdings(self, part: str) -> list[Holding]:
        """Everything below `part` ("jobs" or "datasets") that has a name of this store."""
        files_of: dict[str, list[tuple[int, dt.datetime]]] = {}
        with self._errors(f"listing {part}"):
            for name, size, changed_at in self._files.below(part):
                if match := _HOLDING.fullmatch(name):
                    files_of.setdefault(match[1], []).append((size, changed_at))
        return [
            Holding(name=name, size=sum(size for size, _ in files), changed_at=max(at for _, at in files))
            for name, files in sorted(files_of.items())
        ]

    def remove(self, name: str) -> None:
        """Remove a holding, manifests first: what a crash leaves then counts as no result. Raises ValueError for a
        name that was not made here."""
        match = _HOLDING.fullmatch(name)
        if match is None or match[1] != name:
            raise ValueError(f"{name} is not a name of this store")
        with self._errors(f"removing {name}"):
            self._files.remove(name, _is_manifest)
            if name.startswith("jobs/"):
                self._files.prune(name.rpartition("/")[0])

    def remove_checkpoint(self, prefix: str) -> None:
        """Remove one checkpoint of a job, its manifest first. Raises ValueError for a name that was not made here."""
        match = _CHECKPOINT.match(f"{prefix}/")
        if match is None or match[1] != prefix:
            raise ValueError(f"{prefix} is not the name of a checkpoint")
        with self._errors(f"removing {prefix}"):
            self._files.remove(prefix, _is_manifest)

    def remove_checkpoints(self, job_id: int, attempt: int) -> None:
        """Remove the checkpoints of a job's attempts up to this one, manifests first."""
        with self._errors(f"removing the checkpoints of job {job_id}"):
            names = [name for name, _, _ in self._files.below(f"jobs/{job_id}/checkpoints")]
        prefixes = {match[1]: int(match[2]) for name in names if (match := _CHECKPOINT.match(name))}
        for prefix in sorted(prefix for prefix, number in prefixes.items() if number <= attempt):
            self.remove_checkpoint(prefix)
        with self._errors(f"removing the checkpoints of job {job_id}"):
            self._files.prune(f"jobs/{job_id}/checkpoints")
            self._files.prune(f"jobs/{job_id}")

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (ArtifactError, ServiceUnreachable):
            raise
        except FileNotFoundError as error:
            raise ArtifactError(f"{doing}: not found in {redacted(self.url)}") from error
        except OSError as error:
            # s3fs and fsspec report the service's answers as OSError; without an errno the service did not answer.
            why = error.strerror or str(error) or type(error).__name__
            raise ArtifactError(
                f"{doing} in {redacted(self.url)}: {why}", "check LORACTL_ARTIFACTS_URL and its free space"
            ) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
                raise
            raise ServiceUnreachable(
                "the artifact store", redacted(self.url), "LORACTL_ARTIFACTS_URL", str(error)
            ) from error


def open_store(settings: Settings) -> ArtifactStore:
    """The artifact store of this installation."""
    return ArtifactStore(settings.artifacts_url)


def attempt_prefix(job_id: int, attempt: int) -> str:
    """Where an attempt's files go."""
    return f"jobs/{job_id}/attempt-{attempt}"


def checkpoint_prefix(job_id: int, attempt: int, step: int) -> str:
    """Where an attempt's checkpoint of a step goes."""
    return f"jobs/{job_id}/checkpoints/{attempt}-{step}"


def _is_manifest(name: str) -> bool:
    return name.endswith(f"/{MANIFEST}")


def _checked(file: StoredFile) -> StoredFile:
    """A manifest's entry. Raises ValueError when its hash is not a hash: other code names folders after it."""
    if not isinstance(file.sha256, str) or not _SHA256.fullmatch(file.sha256) or not isinstance(file.size, int):
        raise ValueError("no hash or no size")
    return file


def _inside(name: str) -> str:
    """A manifest's name, unless it would lead `pull` out of its folder: others may write to the store, too.

    Raises ArtifactError, also for names that a terminal or another system reads in their own way.
    """
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ArtifactError(f"{name!r} is no name for a file of a result")
    return name


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
