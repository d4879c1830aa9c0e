"""The artifact store: data sets by content hash and results by attempt, in a folder or on S3 (fsspec).

A result is written under jobs/<id>/attempt-<n>/ and closed by manifest.json, which names every file with its size and
sha256. Whatever has no manifest does not exist. Names are made here, never from what a person typed.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import ArtifactError, ServiceUnreachable, UsageError
from .settings import Settings, redacted

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20

FRESH_S = 3600.0
"""A data set that was stored longer ago is dated anew by the next submit: loractl gc goes by that date, and must not
take what a job that is just being submitted will name."""

_HOLDING = re.compile(
    r"(jobs/[1-9]\d{0,17}/(?:attempt-[1-9]\d{0,8}|checkpoints)|datasets/[0-9a-f]{64}(?:\.\w{1,16})?(?:\.part-\d+)?)"
    r"(?:/.*)?",
    re.ASCII | re.DOTALL,
)
"""The names that are made here. Nothing else is listed, and nothing else removed."""


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
        self._fs, self._root = _filesystem(self.url)
        self._in_folder = "file" in ([self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol)

    def put_dataset(self, path: Path) -> tuple[str, str]:
        """Upload a data set under its content hash, once. Returns (uri, sha256)."""
        digest = sha256_of(path)
        name = f"datasets/{digest}{path.suffix.lower()}"
        with self._errors(f"storing {path.name}"):
            if not self._fs.exists(self._at(name)) or self._hash(name) != digest:
                self._put(path, name)
            else:
                self._refresh(path, name)
        return f"{self.url}/{name}", digest

    def fetch_dataset(self, uri: str, sha256: str, folder: Path) -> Path:
        """Download a data set into `folder` unless it is there; its content must match the hash.

        Raises ArtifactError, also for what put_dataset can't have stored: a row that another wrote could name anything.
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
            self._get(name, target)
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
                self._put(path, f"{prefix}/{name}")
            text = json.dumps({name: vars(file) for name, file in manifest.items()}, indent=1)
            self._fs.pipe_file(self._at(f"{prefix}/{MANIFEST}"), text.encode())
        self.verify(prefix, manifest)
        return manifest

    def manifest(self, prefix: str) -> Manifest:
        """The manifest that closes `prefix`. Raises ArtifactError when there is none."""
        with self._errors(f"reading {prefix}"):
            try:
                raw = json.loads(self._fs.cat_file(self._at(f"{prefix}/{MANIFEST}")))
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
                if self._hash(f"{prefix}/{name}") != file.sha256:
                    raise ArtifactError(f"{self.url}/{prefix}/{name} does not match its manifest")
        return manifest

    def pull(self, prefix: str, part: str, target: Path) -> Manifest:
        """Copy the files of `prefix` whose name begins with `part` into `target`, verified; names without `part`."""
        wanted = {name: file for name, file in self.manifest(prefix).items() if name.startswith(part)}
        if not wanted:
            raise ArtifactError(f"{self.url}/{prefix} has no {part}")
        for name, file in wanted.items():
            path = target / name.removeprefix(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._errors(f"fetching {name}"):
                self._get(f"{prefix}/{name}", path)
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
            raw: bytes = self._fs.cat_file(self._at(f"{prefix}/{name}"))
        if hashlib.sha256(raw).hexdigest() != file.sha256:
            raise ArtifactError(f"{self.url}/{prefix}/{name} does not match its manifest")
        return raw

    def holdings(self, part: str) -> list[Holding]:
        """Everything below `part` ("jobs" or "datasets") whose name was made here."""
        files_of: dict[str, list[tuple[int, dt.datetime]]] = {}
        with self._errors(f"listing {part}"):
            for name, size, changed_at in self._files(part):
                if match := _HOLDING.fullmatch(name):
                    files_of.setdefault(match[1], []).append((size, changed_at))
        return [
            Holding(name=name, size=sum(size for size, _ in files), changed_at=max(at for _, at in files))
            for name, files in sorted(files_of.items())
        ]

    def remove(self, name: str) -> None:
        """Remove a holding; manifests first, so that what is left after a crash is no result. Raises ValueError for a
        name that was not made here."""
        match = _HOLDING.fullmatch(name)
        if match is None or match[1] != name:
            raise ValueError(f"{name} is not a name of this store")
        with self._errors(f"removing {name}"):
            files = [file for file, _, _ in self._files(name)] or [name]
            manifests = [file for file in files if file.endswith(f"/{MANIFEST}")]
            if not self._in_folder:
                for some in (manifests, [file for file in files if file not in manifests]):
                    if some:
                        self._fs.rm([self._at(file) for file in some])
                return
            for file in manifests:
                Path(self._at(file)).unlink(missing_ok=True)
            remove_tree(Path(self._at(name)))
            if name.startswith("jobs/"):
                with contextlib.suppress(OSError):  # other attempts are left
                    Path(self._at(name)).parent.rmdir()

    def remove_checkpoint(self, prefix: str) -> None:
        """Remove one checkpoint of a job, its manifest first. Raises ValueError for a name that was not made here."""
        if not re.fullmatch(r"jobs/[1-9]\d{0,17}/checkpoints/[1-9]\d{0,8}-\d{1,12}", prefix, re.ASCII):
            raise ValueError(f"{prefix} is not the name of a checkpoint")
        with self._errors(f"removing {prefix}"):
            names = sorted((name for name, _, _ in self._files(prefix)), key=lambda name: not name.endswith(MANIFEST))
            for name in names:
                self._fs.rm_file(self._at(name))
            if self._in_folder:
                remove_tree(Path(self._at(prefix)))

    def _files(self, part: str) -> Iterator[tuple[str, int, dt.datetime]]:
        """(name, bytes, last change) of each file below `part`; links are not followed out of the store."""
        if not self._in_folder:
            for path, info in self._fs.find(self._at(part), detail=True).items():
                yield path.removeprefix(f"{self._root}/"), info["size"], info["LastModified"].astimezone(dt.UTC)
            return
        top = Path(self._at(part))
        for path in [top] if top.is_symlink() or top.is_file() else _walk(top):
            with contextlib.suppress(FileNotFoundError):  # was just removed by somebody else
                facts = path.lstat()
                changed_at = dt.datetime.fromtimestamp(facts.st_mtime, dt.UTC)
                yield path.relative_to(self._root).as_posix(), facts.st_size, changed_at

    def _refresh(self, path: Path, name: str) -> None:
        """Give an equal data set that is there already the date of today."""
        if self._in_folder:
            with contextlib.suppress(PermissionError):  # another person's, whose date only they can change
                os.utime(self._at(name))
                return
        elif dt.datetime.now(dt.UTC) - self._fs.modified(self._at(name)) < dt.timedelta(seconds=FRESH_S):
            return
        self._put(path, name)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, path: Path, name: str) -> None:
        """Write aside and rename where renaming is atomic (a folder); S3 shows an object only when it is complete."""
        target = self._at(name)
        if not self._in_folder:
            self._fs.put_file(str(path), target)
            return
        self._fs.makedirs(Path(target).parent.as_posix(), exist_ok=True)
        aside = f"{target}.part-{os.getpid()}"
        try:
            self._fs.put_file(str(path), aside)
            Path(aside).replace(target)
        finally:
            Path(aside).unlink(missing_ok=True)

    def _get(self, name: str, path: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as aside:
            part = Path(aside.name)
        try:
            self._fs.get_file(self._at(name), str(part))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _hash(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(self._at(name), "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (ArtifactError, ServiceUnreachable):
            raise
        except FileNotFoundError as error:
            raise ArtifactError(f"{doing}: not found in {redacted(self.url)}") from error
        except OSError as error:
            # s3fs and fsspec report the service's answers as OSError; no errno means that none came.
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


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with all below it; a link goes itself, what it leads to stays."""
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _walk(top: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(top):
        yield from (Path(folder) / name for name in names)


def _checked(file: StoredFile) -> StoredFile:
    """A manifest's entry, unless its hash is none: others make names of folders from it. Raises ValueError."""
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


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith("s3://"):
        # Other people write here too: a cached listing would hide their files.
        options = {
            "use_listings_cache": False,
            "skip_instance_cache": True,
            "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 3}},
        }
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            options["endpoint_url"] = endpoint
    if url.startswith("file://"):
        url = unquote(url)  # fsspec takes "mein%20Labor" for a folder's name
    try:
        filesystem, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise UsageError(f"the driver for {redacted(url)} is not installed", "pip install 'loractl[s3]'") from error
    except ValueError as error:
        raise UsageError(
            f"LORACTL_ARTIFACTS_URL is not a URL that can be opened: {redacted(url)}",
            "like file:///srv/loractl or s3://bucket/loractl",
        ) from error
    return filesystem, root.rstrip("/")
