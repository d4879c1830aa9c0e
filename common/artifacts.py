"""The artifact store: data sets by content hash, and what jobs store by attempt.

A result is written under jobs/<id>/attempt-<n>/ and closed by manifest.json, which names every file with its size and
sha256. Without a manifest, files do not count as stored. The job's row holds the manifest's hash: readers of a result
or a checkpoint pass it (Binding), so replaced files are refused. Names are made here, never from what a person typed.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .errors import (
    ArtifactError,
    DataError,
    NotStorable,
    ReportUnknown,
    ResultTaken,
    ServiceUnreachable,
    StoreFailed,
    WrongStore,
)
from .files import Doing, Folder, Unfinished, nothing_told, open_files
from .settings import S3Keys, Settings, redacted

log = logging.getLogger("loractl")

MARK = ".loractl-lab"
"""Says whose store it is: another folder may have the same path, and another bucket the same name."""

MANIFEST = "manifest.json"
WEIGHTS = "adapter/adapter_model.safetensors"
"""The adapter's weights in a result."""

LONGEST_NAME = 237
"""Bytes of a file's name: a folder's disk takes 255, and the file is first written under a longer name."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

_HOLDING = re.compile(
    r"(jobs/[1-9]\d{0,17}/(?:attempt-[1-9]\d{0,8}|checkpoints)|datasets/[0-9a-f]{64}(?:\.\w{1,16})?)"
    r"(?:/.*)?",
    re.ASCII | re.DOTALL,
)
"""The names that are made here. Nothing else is listed or removed."""


_CHECKPOINT = re.compile(r"(jobs/[1-9]\d{0,17}/checkpoints/([1-9]\d{0,8})-\d{1,12})/", re.ASCII)
"""Where a job's checkpoint is, and the attempt that wrote it."""


REPORT = "report.json"
FINAL = "final"
"""The part of a report with the figures of the final rows. Showing it records a look."""

_SECTIONS = ("job", "verdict", "adapter", "data", "training", "evaluation", "versions")


class _ReportPart(dict[str, Any]):
    """An object in a report; the error for a missing key names the report's file."""

    def __init__(self, file: str, content: dict[str, Any]) -> None:
        super().__init__(content)
        self._file = file

    def __missing__(self, key: str) -> Any:
        raise ReportUnknown(self._file, f"it lacks {key!r}")


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


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A result or a checkpoint as its row describes it.

    Rows of earlier versions lack the manifest's hash: their results are not bound, and readers say so. The hash of
    the weights is known even then.
    """

    prefix: str  # where it is in the store
    manifest_sha256: str | None  # of manifest.json; None: not bound
    weights_sha256: str | None = None  # of WEIGHTS, for a result that is not bound


def names_dataset(url: str | None, uri: str, sha256: str) -> bool:
    """Whether put_dataset of the store at `url` can have returned these. Others may have written them into a row.

    None: a store that is known by its mark, wherever it was when the data set was stored.
    """
    name = "/".join(uri.split("/")[-2:]) if url is None else uri.removeprefix(url.rstrip("/") + "/")
    return bool(_SHA256.fullmatch(sha256) and re.fullmatch(rf"datasets/{sha256}\.[a-z]{{1,8}}", name))


class ArtifactStore:
    """Files under one URL, file:// or s3://. `doing` is called with the current activity, for each block moved."""

    def __init__(
        self,
        url: str,
        tell: Callable[[str], None] | None = None,
        doing: Doing = nothing_told,
        keys: S3Keys | None = None,
        *,
        mark: str | None = None,
        is_own: bool = False,
    ) -> None:
        """`tell` takes a sentence for people, once for each result read that is not bound to its row.

        `mark`: the lab's. Then every method raises WrongStore for a store with another mark, or with none. "": the lab
        knows none yet, but a missing folder is refused. None: nothing is checked. `is_own`: a bucket that has the mark.
        """
        self.url = url.rstrip("/")
        self._files = open_files(self.url, doing, keys)
        self._tell = log.warning if tell is None else tell
        self._told: set[str] = set()
        self.mark = mark
        self._is_own = is_own

    def check(self) -> None:
        """Raises WrongStore if this is not the lab's store, ArtifactError, ServiceUnreachable."""
        with self._errors("looking for the store"):
            pass

    def read_mark(self) -> str | None:
        """The mark that it has; None: none."""
        with self._errors("reading the mark"):
            return self._found_mark()

    def write_mark(self, mark: str) -> None:
        """Give it this mark."""
        with self._errors("writing the mark"):
            self._files.write(MARK, f"{mark}\n".encode())

    def has_result(self, prefix: str) -> bool:
        """Whether a result is closed there; nothing of it is checked."""
        with self._errors(f"looking for {prefix}"):
            return self._files.exists(f"{prefix}/{MANIFEST}")

    def put_dataset(self, path: Path) -> tuple[str, str]:
        """Upload a data set under its content hash, once. Returns (uri, sha256). Raises DataError for a file that
        somebody writes meanwhile: what is stored may not be what the hash says."""
        digest = sha256_of(path)
        name = f"datasets/{digest}{path.suffix.lower()}"
        with self._errors(f"storing {path.name}"):
            if not self._files.exists(name) or self._files.hash(name) != digest:
                self._files.put(path, name)
                changed = sha256_of(path) != digest
            else:
                self._files.refresh(path, name)
                changed = False
        if changed:
            raise DataError(path, "was changed while it was stored", hint="submit again once nobody writes it")
        return f"{self.url}/{name}", digest

    def fetch_dataset(self, uri: str, sha256: str, folder: Path) -> Path:
        """Download a data set into `folder` unless it is there; its content must match the hash.

        Raises ArtifactError, also for a name that put_dataset can't have made: others may have written the row.
        """
        if not names_dataset(None if self.mark else self.url, uri, sha256):
            raise ArtifactError(f"{uri!r} is not a data set of this store", "submit the job again")
        name = "/".join(uri.split("/")[-2:])
        target = folder / Path(name).name
        if _has(target, sha256):
            os.utime(target)  # loractl gc removes data sets that nobody has used for long
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with self._errors(f"fetching {uri}"):
            self._files.get(name, target)
        if not _has(target, sha256):
            target.unlink(missing_ok=True)
            raise ArtifactError(f"{uri} does not have the content that was submitted", "submit the job again")
        return target

    def put_result(self, folder: Path, prefix: str) -> Manifest:
        """Upload every file below `folder` under `prefix`, close it with a manifest and read all of it back.

        Raises ArtifactError when something can't be written or reads back differently, ServiceUnreachable, ResultTaken,
        NotStorable; FileNotFoundError when the folder has no file, or disappears.
        """
        paths = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
        if not paths:  # the folder is being removed, or is gone: storing it would make it a whole result
            raise FileNotFoundError(errno.ENOENT, "no file to store", str(folder))
        if wrong := next((p for p in paths if p.is_symlink() or not p.is_file()), None):
            # a link would be followed, and its target stored under the job's name
            raise NotStorable(f"storing {prefix}: {wrong.relative_to(folder).as_posix()!r} is not a plain file")
        files = {_inside(p.relative_to(folder).as_posix()): p for p in paths}
        manifest = {name: StoredFile(size=p.stat().st_size, sha256=sha256_of(p)) for name, p in files.items()}
        self._refuse_another_s(prefix, manifest.get(WEIGHTS))
        with self._errors(f"storing {prefix}"):
            for name, path in files.items():
                self._files.put(path, f"{prefix}/{name}")
            self._files.write(f"{prefix}/{MANIFEST}", _closing(manifest))
        self.verify(Binding(prefix=prefix, manifest_sha256=manifest_sha256(manifest)))
        return manifest

    def manifest(self, stored: Binding) -> Manifest:
        """The manifest that closes a result or a checkpoint. Raises ArtifactError if it is missing, or another one."""
        raw = self._closed_by(stored.prefix)
        if stored.manifest_sha256 is not None and hashlib.sha256(raw).hexdigest() != stored.manifest_sha256:
            raise self._replaced(stored.prefix, "its manifest is not the one")
        manifest = self._parsed(stored.prefix, raw)
        weights = manifest.get(WEIGHTS)
        if stored.weights_sha256 is not None and (weights is None or weights.sha256 != stored.weights_sha256):
            raise self._replaced(stored.prefix, "its weights are not those")
        if stored.manifest_sha256 is None:
            self._say_not_bound(stored.prefix)
        return manifest

    def verify(self, stored: Binding) -> Manifest:
        """Read every file back and compare it with the manifest. Raises ArtifactError."""
        prefix, manifest = stored.prefix, self.manifest(stored)
        with self._errors(f"verifying {prefix}"):
            for name, file in manifest.items():
                if self._files.hash(f"{prefix}/{name}") != file.sha256:
                    raise ArtifactError(f"{self.url}/{prefix}/{name} does not match its manifest")
        return manifest

    def bound(self, stored: Binding) -> Binding:
        """The result with the hash of its current manifest, if all its files match that. Raises ArtifactError.

        Only its weights are compared with its row: binding trusts the other files as they are.
        """
        now = replace(stored, manifest_sha256=hashlib.sha256(self._closed_by(stored.prefix)).hexdigest())
        self.verify(now)
        return now

    def pull(self, stored: Binding, part: str, target: Path) -> Manifest:
        """Copy the files whose names begin with `part` into `target`, verified, under the rest of their names."""
        prefix = stored.prefix
        wanted = {name: file for name, file in self.manifest(stored).items() if name.startswith(part)}
        if not wanted:
            raise ArtifactError(f"{self.url}/{prefix} has no {part}")
        for name, file in wanted.items():
            path = target / name.removeprefix(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._errors(f"fetching {name}"):
                self._files.get(f"{prefix}/{name}", path)
            if sha256_of(path) != file.sha256:
                path.unlink()
                raise ArtifactError(f"{self.url}/{prefix}/{name} does not match its manifest")
        return {name.removeprefix(part): file for name, file in wanted.items()}

    def read_report(self, stored: Binding) -> dict[str, Any]:
        """report.json of a result, without what was measured on final rows.

        Raises ArtifactError; ReportUnknown also at the lookup of a key that it lacks.
        """
        return split_final(self._whole_report(stored))[0]

    def read_final(self, stored: Binding) -> dict[str, Any] | None:
        """What a result's report says about its final rows; None if it has none. Record a look before you show it.

        Raises as read_report does.
        """
        final = split_final(self._whole_report(stored))[1]
        if final is not None and not _SHA256.fullmatch(str(final.get("sha256"))):
            raise ReportUnknown(f"{self.url}/{stored.prefix}/{REPORT}", "its final rows have no sha256")
        return final

    def _whole_report(self, stored: Binding) -> dict[str, Any]:
        file = f"{self.url}/{stored.prefix}/{REPORT}"
        try:
            content = json.loads(self.read_bytes(stored, REPORT), object_hook=lambda part: _ReportPart(file, part))
        except (ValueError, RecursionError):
            raise ReportUnknown(file, "it can't be read as JSON") from None
        if not isinstance(content, dict):
            raise ReportUnknown(file, "it is not an object")
        if wrong := next((name for name in _SECTIONS if not isinstance(content.get(name, {}), dict)), None):
            raise ReportUnknown(file, f"its {wrong!r} is no object")
        return content

    def read_bytes(self, stored: Binding, name: str) -> bytes:
        """A small file of a result, checked against the manifest."""
        prefix, file = stored.prefix, self.manifest(stored).get(name)
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

    def unfinished(self, before: dt.datetime) -> list[Unfinished]:
        """Unfinished files with a name of this store that have not grown since then."""
        with self._errors("listing what was not ended"):
            found = [file for part in ("jobs", "datasets") for file in self._files.unfinished(part, before)]
        mine = [file for file in found if _HOLDING.fullmatch(file.name)]
        return [file for file in mine if not self._is_named(file)]

    def drop(self, file: Unfinished) -> None:
        """Remove the part that was written."""
        with self._errors(f"removing {file.name}"):
            self._files.drop(file)

    def _is_named(self, file: Unfinished) -> bool:
        """Whether this is a whole file of a result that only has the name of an unfinished one."""
        match = _HOLDING.fullmatch(file.aside)
        try:
            return match is not None and file.aside[len(match[1]) + 1 :] in self._parsed("", self._closed_by(match[1]))
        except ArtifactError:
            return False

    def remove(self, name: str) -> None:
        """Remove a holding, manifests first: then what a crash leaves does not count as a result. Raises ValueError for
        a name that was not made here."""
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
        """Remove the checkpoints of a job's attempts up to this one, and those without an attempt, manifests first."""
        with self._errors(f"removing the checkpoints of job {job_id}"):
            prefixes = {"/".join(name.split("/")[:4]) for name, _, _ in self._files.below(f"jobs/{job_id}/checkpoints")}
            for prefix in sorted(prefixes):
                match = _CHECKPOINT.match(f"{prefix}/")
                if match is None or int(match[2]) <= attempt:
                    self._files.remove(prefix, _is_manifest)
            self._files.prune(f"jobs/{job_id}/checkpoints")
            self._files.prune(f"jobs/{job_id}")

    def _refuse_another_s(self, prefix: str, weights: StoredFile | None) -> None:
        """Refuse to write a result over another one: a restored database may assign a number again.

        An attempt has the same weights whenever it is stored.
        """
        with self._errors(f"looking for {prefix}"):
            if weights is None or not self._files.exists(f"{prefix}/{MANIFEST}"):
                return
        try:
            held = self._parsed(prefix, self._closed_by(prefix)).get(WEIGHTS)
        except ArtifactError:  # a damaged one closes no result
            return
        if held is not None and held != weights:
            raise ResultTaken(
                f"{self.url}/{prefix} holds another result, which is kept", "the next attempt is stored next to it"
            )

    def _closed_by(self, prefix: str) -> bytes:
        """The manifest's own bytes. Raises ArtifactError if there is none."""
        with self._errors(f"reading {prefix}"):
            try:
                return self._files.read(f"{prefix}/{MANIFEST}")
            except FileNotFoundError:
                raise ArtifactError(
                    f"{self.url}/{prefix} has no manifest: it was not stored, or was removed since",
                    "if somebody removed it, restore it from a backup, or run the job again",
                ) from None

    def _parsed(self, prefix: str, raw: bytes) -> Manifest:
        try:
            return {_inside(name): _checked(StoredFile(**file)) for name, file in json.loads(raw).items()}
        except (AttributeError, TypeError, ValueError, RecursionError, ArtifactError):
            raise ArtifactError(f"the manifest of {self.url}/{prefix} is damaged") from None

    def _replaced(self, prefix: str, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.url}/{prefix} was changed after it was stored: {what} that its row names",
            "somebody wrote to the artifact store; restore the files from a backup, or run the job again",
        )

    def _say_not_bound(self, prefix: str) -> None:
        if prefix not in self._told:
            self._told.add(prefix)
            self._tell(
                f"{prefix} is not bound to its row: an earlier version stored it, and its files may have been replaced "
                "since; run loractl adapters bind"
            )

    def _require_own(self) -> None:
        """A bucket is looked at once, a folder each time: its share may be unmounted meanwhile."""
        if self.mark is None or self._is_own:
            return
        if isinstance(self._files, Folder) and not self._files.is_there():
            raise WrongStore(redacted(self.url), "this machine has no such folder")
        if self.mark and (found := self._found_mark()) != self.mark:
            raise WrongStore(redacted(self.url), "it has no mark" if found is None else "it has another lab's mark")
        self._is_own = not isinstance(self._files, Folder)

    def _found_mark(self) -> str | None:
        try:
            return self._files.read(MARK)[:64].decode(errors="replace").strip() or None
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            self._require_own()
            yield
        except (ArtifactError, ServiceUnreachable):
            raise
        except FileNotFoundError as error:
            raise ArtifactError(f"{doing}: not found in {redacted(self.url)}") from error
        except OSError as error:
            # s3fs and fsspec report the service's answers as OSError; without an errno the service did not answer.
            why = error.strerror or str(error) or type(error).__name__
            hint = _HINTS.get(error.errno or 0, "check LORACTL_ARTIFACTS_URL and its free space")
            raise StoreFailed(f"{doing} in {redacted(self.url)}: {why}", hint) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
                raise
            keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            setting = keys if "Credentials" in type(error).__name__ else "LORACTL_ARTIFACTS_URL"
            raise ServiceUnreachable("the artifact store", redacted(self.url), setting, str(error)) from error


_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space on the disk that is written to"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "it must be one that you may write"),
}
"""What to do about a file system's error, by its number."""


def split_final(report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A report as anybody may see it, and its part about final rows."""
    final = report.pop(FINAL, None)
    return report, final if isinstance(final, dict) else None


def open_store(
    settings: Settings, tell: Callable[[str], None] | None = None, *, mark: str | None = None
) -> ArtifactStore:
    """The store at this installation's address; `tell` and `mark` as for ArtifactStore."""
    return ArtifactStore(settings.artifacts_url, tell, keys=settings.s3, mark=mark)


def attempt_prefix(job_id: int, attempt: int) -> str:
    """Where an attempt's files go."""
    return f"jobs/{job_id}/attempt-{attempt}"


def checkpoint_prefix(job_id: int, attempt: int, step: int | Literal[""]) -> str:
    """Where an attempt's checkpoint of a step goes; without a step: how the places of all its checkpoints begin."""
    return f"jobs/{job_id}/checkpoints/{attempt}-{step}"


def manifest_sha256(manifest: Manifest) -> str:
    """The hash of the file that `put_result` closes a result with."""
    return hashlib.sha256(_closing(manifest)).hexdigest()


def _closing(manifest: Manifest) -> bytes:
    """manifest.json."""
    return json.dumps({name: vars(file) for name, file in manifest.items()}, indent=1).encode()


def _is_manifest(name: str) -> bool:
    return name.endswith(f"/{MANIFEST}")


def _checked(file: StoredFile) -> StoredFile:
    """A manifest's entry. Raises ValueError when its hash is malformed: other code names folders after it."""
    if not isinstance(file.sha256, str) or not _SHA256.fullmatch(file.sha256) or not isinstance(file.size, int):
        raise ValueError("no hash or no size")
    return file


def _inside(name: str) -> str:
    """A manifest's file name, unless it would lead `pull` out of its folder: others may write to the store, too.

    Raises NotStorable, also for names that a terminal or another system would interpret.
    """
    if not all(map(is_file_name, name.split("/"))):
        raise NotStorable(f"{name!r} is not a valid file name in a result")
    return name


def is_file_name(name: str) -> bool:
    """Whether a file of a result may have this name, in any folder."""
    plain = name.isprintable() and not {"/", "\\"} & {*name} and name not in ("", ".", "..")
    return plain and len(name.encode()) <= LONGEST_NAME


def _has(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this hash: another attempt of the box may remove it meanwhile."""
    try:
        return sha256_of(path) == sha256
    except FileNotFoundError:
        return False


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
