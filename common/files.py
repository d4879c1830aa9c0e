"""The files below one URL, by name: plain files in a folder, or objects on S3 (fsspec)."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import functools
import hashlib
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from .errors import UsageError
from .settings import S3Keys, checked_url, redacted

FRESH_S = 3600.0
"""A submit sets the date of a file older than this to today. loractl gc goes by the date, and must not remove a file
that a job names which is just being submitted."""

DEAD_S = 600.0
"""A file being fetched that has not grown for this many seconds is abandoned: a node kills a call that moves nothing
for half of that, and tries again."""

_BLOCK = 1 << 20

_PART = 16 << 20
"""Bytes of a large file in one request to or from S3: a part on its way reports nothing, and a call that reports
nothing for minutes is given up."""

_MOST_PARTS = 10_000
"""Of one file on S3."""

_UNSYNCED = 32 << 20
"""Bytes that may wait for a folder's disk, for the same reason: waiting for the disk is one call."""

_REMOVED = 1000
"""Objects that S3 removes in one call, at most."""

_AS_DATA = {"ContentType": "application/octet-stream", "ContentDisposition": "attachment"}
"""For S3: makes a browser save an object, instead of showing a report.html as a page of the store."""

_ASIDE = re.compile(r"\.part-\d{1,12}\Z", re.ASCII)
"""The ending of a file's name while it is being written to a folder."""

Doing = Callable[[str], None]
"""Called with what is being done, at its start and for each block moved."""


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A file that is not written completely: its writer is still at work, or was killed."""

    name: str  # that it was to get
    aside: str  # its path in a folder; on S3 the number of the upload
    size: int  # bytes; 0 on S3, which does not list them
    changed_at: dt.datetime  # when it last grew


def nothing_told(what: str) -> None:
    """For a caller that does not ask."""


class Bucket:
    """Objects on S3. A reader sees an object only when it is complete."""

    def __init__(
        self, filesystem: Any, root: str, doing: Doing = nothing_told, headers: Mapping[str, str] | None = None
    ) -> None:
        """`headers`: what the store says to a browser about each object put there."""
        self._fs = filesystem
        self._root = root
        self._doing = doing
        self._headers = headers or {}

    def exists(self, name: str) -> bool:
        self._doing(f"looking for {name}")
        return bool(self._fs.exists(self._at(name)))

    def read(self, name: str) -> bytes:
        self._doing(f"reading {name}")
        content: bytes = self._fs.cat_file(self._at(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        self._doing(f"writing {name}")
        self._fs.pipe_file(self._at(name), content, **self._headers)

    def hash(self, name: str) -> str:
        """Hex sha256 of a file's content, read back in blocks."""
        digest, what = hashlib.sha256(), f"reading {name} back"
        self._doing(what)
        with self._fs.open(self._at(name), "rb", block_size=_PART) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                self._doing(what)
        return digest.hexdigest()

    def put(self, path: Path, name: str) -> None:
        """Upload a file."""
        moving, how = self._moving(f"writing {name}"), dict[str, Any](self._headers)
        if hasattr(self._fs, "call_s3"):
            how["chunksize"] = max(_PART, math.ceil(path.stat().st_size / _MOST_PARTS))
        self._fs.put_file(str(path), self._at(name), callback=moving, **how)

    def get(self, name: str, path: Path) -> None:
        """Download a file: written aside and renamed. Removes what a killed process had begun."""
        begun = f".part-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}-"
        for part in path.parent.glob(f"{begun}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > DEAD_S:
                    part.unlink()
        part = path.parent / f"{begun}{secrets.token_hex(8)}"
        try:
            part.touch(exist_ok=False)  # before the store answers, which may be never
            self._load(name, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def refresh(self, path: Path, name: str) -> None:
        """Set the date of a stored file that equals `path` to today."""
        if dt.datetime.now(dt.UTC) - self._fs.modified(self._at(name)) >= dt.timedelta(seconds=FRESH_S):
            self.put(path, name)

    def below(self, part: str) -> Iterator[tuple[str, int, dt.datetime]]:
        """(name, bytes, last change) of each file below `part`, or of `part` itself."""
        self._doing(f"listing {part}")
        for path, info in self._fs.find(self._at(part), detail=True).items():
            if info["type"] == "directory":  # where objects are files, an empty folder is listed as itself
                continue
            yield path.removeprefix(f"{self._root}/"), info["size"], info["LastModified"].astimezone(dt.UTC)

    def remove(self, part: str, first: Callable[[str], bool]) -> None:
        """Remove all files below `part`, or `part` itself; first those that `first` picks."""
        names = [name for name, _, _ in self.below(part)]
        for some in ([name for name in names if first(name)], [name for name in names if not first(name)]):
            if some:
                self._doing(f"removing {part}")
                self._remove([self._at(name) for name in some])

    def _remove(self, paths: Sequence[str]) -> None:
        """fsspec's own way passes over what S3 answers of each object that may not go, or could not."""
        if not hasattr(self._fs, "call_s3"):
            self._fs.rm(paths)
            return
        bucket, *_ = self._fs.split_path(paths[0])
        keys = [{"Key": self._fs.split_path(path)[1]} for path in paths]
        for some in (keys[start : start + _REMOVED] for start in range(0, len(keys), _REMOVED)):
            answer = self._fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": some, "Quiet": True})
            for error in answer.get("Errors") or ():
                number = errno.EACCES if error.get("Code") == "AccessDenied" else errno.EIO
                told = ": ".join(filter(None, (error.get("Code"), error.get("Message"))))
                raise OSError(number, told, error.get("Key"))

    def prune(self, part: str) -> None:
        """Remove an empty folder; a bucket has none."""

    def unfinished(self, part: str, before: dt.datetime) -> Iterator[Unfinished]:
        """Incomplete files below `part` that have not grown since then: nobody sees their blocks, and they take room
        until they are removed."""
        if not hasattr(self._fs, "call_s3"):
            return
        bucket, prefix, _ = self._fs.split_path(f"{self._at(part)}/")
        with contextlib.suppress(FileNotFoundError):  # some gateways answer so where nobody has begun one (rclone)
            for page in self._pages(
                "list_multipart_uploads", "KeyMarker", "UploadIdMarker", Bucket=bucket, Prefix=prefix
            ):
                for upload in page.get("Uploads", ()):
                    grew_at = upload["Initiated"]
                    if grew_at < before:  # else listing its parts, a call for each 1,000, says nothing more
                        grew_at = self._grew_at(bucket, upload)
                    if grew_at is not None and grew_at < before:
                        name = f"{bucket}/{upload['Key']}".removeprefix(f"{self._root}/")
                        changed_at = grew_at.astimezone(dt.UTC)
                        yield Unfinished(name=name, aside=upload["UploadId"], size=0, changed_at=changed_at)

    def drop(self, file: Unfinished) -> None:
        """Remove the part that was written."""
        bucket, key, _ = self._fs.split_path(self._at(file.name))
        with contextlib.suppress(FileNotFoundError):  # it was completed, or another process was faster
            self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=file.aside)

    def _grew_at(self, bucket: str, upload: Mapping[str, Any]) -> dt.datetime | None:
        """When an upload got its last part, or began if it has none. None: it is gone, or the time is not known."""
        asked, grew_at = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}, upload["Initiated"]
        page: Mapping[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            for page in self._pages("list_parts", "PartNumberMarker", **asked):
                grew_at = max([grew_at, *(part["LastModified"] for part in page.get("Parts", ()))])
            return None if page.get("IsTruncated") else grew_at
        return None

    def _pages(self, call: str, *markers: str, **asked: str) -> Iterator[Mapping[str, Any]]:
        """All pages of a listing. Some gateways leave out one of the markers, or all: then no page follows."""
        after: dict[str, Any] = {}
        while True:
            self._doing("listing uploads")
            page = self._fs.call_s3(call, **asked, **after)
            yield page
            following = {marker: page[f"Next{marker}"] for marker in markers if page.get(f"Next{marker}")}
            if not page.get("IsTruncated") or following in ({}, after):
                return
            after = following

    def _load(self, name: str, path: Path) -> None:
        self._fs.get_file(self._at(name), str(path), callback=self._moving(f"reading {name}"))

    def _moving(self, what: str) -> Any:
        """What fsspec calls for each part moved."""
        from fsspec.callbacks import Callback

        self._doing(what)
        return Callback(hooks={"moved": lambda size, value, **_: self._doing(what)})

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


class Folder(Bucket):
    """Files in a folder that others may share: a link is not followed out of it.

    A file is written aside and renamed, so that readers see only complete files. It and its folder are on the disk when
    it counts as written: a power loss undoes nothing.
    """

    def is_there(self) -> bool:
        """Whether the folder exists."""
        return Path(self._root).is_dir()

    def write(self, name: str, content: bytes) -> None:
        self._write(name, [content])

    def put(self, path: Path, name: str) -> None:
        """Copy a file."""
        with path.open("rb") as stream:
            self._write(name, iter(lambda: stream.read(_BLOCK), b""))

    def refresh(self, path: Path, name: str) -> None:
        try:
            os.utime(self._at(name))
        except PermissionError:  # another person's file: only they can change its date
            self.put(path, name)

    def below(self, part: str) -> Iterator[tuple[str, int, dt.datetime]]:
        self._doing(f"listing {part}")
        top = Path(self._at(part))
        inside = (Path(folder) / name for folder, _, names in os.walk(top) for name in names)
        for path in [top] if top.is_symlink() or top.is_file() else inside:
            with contextlib.suppress(FileNotFoundError):  # was just removed by somebody else
                facts = path.lstat()
                changed_at = dt.datetime.fromtimestamp(facts.st_mtime, dt.UTC)
                yield path.relative_to(self._root).as_posix(), facts.st_size, changed_at

    def remove(self, part: str, first: Callable[[str], bool]) -> None:
        for name in [name for name, _, _ in self.below(part) if first(name)]:
            Path(self._at(name)).unlink(missing_ok=True)
        remove_tree(Path(self._at(part)))

    def _write(self, name: str, blocks: Iterable[bytes]) -> None:
        target, what = Path(self._at(name)), f"writing {name}"
        self._doing(what)
        _make_folder(target.parent)
        aside = Path(f"{target}.part-{secrets.randbelow(10**12)}")
        try:
            with aside.open("wb") as stream:
                for block in blocks:
                    stream.write(block)
                    if stream.tell() % _UNSYNCED < len(block):
                        _sync_file(stream)
                    self._doing(what)
                _sync_file(stream)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        sync(target.parent)

    def _load(self, name: str, path: Path) -> None:
        what = f"reading {name}"
        self._doing(what)
        with Path(self._at(name)).open("rb") as stream, path.open("wb") as target:
            while block := stream.read(_BLOCK):
                target.write(block)
                self._doing(what)

    def prune(self, part: str) -> None:
        with contextlib.suppress(OSError):  # other files are left
            Path(self._at(part)).rmdir()

    def unfinished(self, part: str, before: dt.datetime) -> Iterator[Unfinished]:
        for name, size, changed_at in self.below(part):
            if _ASIDE.search(name) and changed_at < before:
                yield Unfinished(name=_ASIDE.sub("", name), aside=name, size=size, changed_at=changed_at)

    def drop(self, file: Unfinished) -> None:
        Path(self._at(file.aside)).unlink(missing_ok=True)


def open_files(url: str, doing: Doing = nothing_told, keys: S3Keys | None = None) -> Bucket:
    """The files below a URL, with the settings' account of S3. Raises UsageError for one that can't be opened."""
    import fsspec

    options: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if url.startswith("s3://"):
        headers = _AS_DATA
        # Other people write here too: a cached listing would hide their files.
        options = {
            "use_listings_cache": False,
            "skip_instance_cache": True,
            # Parts on their way at once. With the default of ten, a slow line would show no sign of life for long.
            "max_concurrency": 2,
            "config_kwargs": {
                "connect_timeout": 5,
                "read_timeout": 30,
                "retries": {"max_attempts": 3},
                # Some servers send the whole file's with a part of it. What is read is compared with a hash of ours.
                "response_checksum_validation": "when_required",
            },
            **(keys.options() if keys else {}),
        }
        with contextlib.suppress(ImportError):  # url_to_fs says that the driver is missing
            options["session"] = _session()
        named = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)), None)
        if named is not None:
            options["endpoint_url"] = checked_url(named, "endpoint_url", os.environ[named])
    if url.startswith("file://"):
        url = unquote(url)  # fsspec takes "mein%20Labor" for a folder's name
    try:
        filesystem, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise UsageError(f"the driver for {redacted(url)} is not installed", "pip install 'loractl[s3]'") from error
    kinds = [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
    return (Folder if "file" in kinds else Bucket)(filesystem, root.rstrip("/"), doing, headers)


def _session() -> Any:
    """A separate session, which reads the account again; the service's description, megabytes of JSON, is shared."""
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register_component("data_loader", _service_models(session.get_config_variable("data_path")))
    return session


@functools.cache
def _service_models(search_path: str | None) -> Any:
    from botocore.loaders import create_loader

    return create_loader(search_path)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with all below it. For a link, only the link itself goes."""
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _make_folder(path: Path) -> None:
    """Create a folder and its missing parents; each is on the disk then."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def _sync_file(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't sync a folder, and need not
            raise
    finally:
        os.close(place)
