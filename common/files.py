"""The files below one URL, by name: plain files in a folder, or objects on S3 (fsspec)."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import UsageError
from .settings import redacted

FRESH_S = 3600.0
"""The next submit gives a file that is older than this today's date. loractl gc goes by the date, and must not take
what a job names that is just being submitted."""

_BLOCK = 1 << 20


class Bucket:
    """Objects on S3 or any other store that fsspec knows. A reader sees an object only when it is complete."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self._at(name)))

    def read(self, name: str) -> bytes:
        content: bytes = self._fs.cat_file(self._at(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(self._at(name), content)

    def hash(self, name: str) -> str:
        """Hex sha256 of a file's content, read back in blocks."""
        digest = hashlib.sha256()
        with self._fs.open(self._at(name), "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def put(self, path: Path, name: str) -> None:
        """Upload a file."""
        self._fs.put_file(str(path), self._at(name))

    def get(self, name: str, path: Path) -> None:
        """Download a file: written aside and renamed."""
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as aside:
            part = Path(aside.name)
        try:
            self._fs.get_file(self._at(name), str(part))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def refresh(self, path: Path, name: str) -> None:
        """Give a file that is there already, equal to `path`, the date of today."""
        if dt.datetime.now(dt.UTC) - self._fs.modified(self._at(name)) >= dt.timedelta(seconds=FRESH_S):
            self.put(path, name)

    def below(self, part: str) -> Iterator[tuple[str, int, dt.datetime]]:
        """(name, bytes, last change) of each file below `part`, or of `part` itself."""
        for path, info in self._fs.find(self._at(part), detail=True).items():
            yield path.removeprefix(f"{self._root}/"), info["size"], info["LastModified"].astimezone(dt.UTC)

    def remove(self, part: str, first: Callable[[str], bool]) -> None:
        """Remove all files below `part`, or `part` itself; those that `first` picks before the others."""
        names = [name for name, _, _ in self.below(part)]
        for some in ([name for name in names if first(name)], [name for name in names if not first(name)]):
            if some:
                self._fs.rm([self._at(name) for name in some])

    def prune(self, part: str) -> None:
        """Remove an empty folder; a bucket has none."""

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


class Folder(Bucket):
    """Files in a folder that others may share: a link is not followed out of it."""

    def put(self, path: Path, name: str) -> None:
        """Copy a file: written aside and renamed, so that it is seen only when it is complete."""
        target = Path(self._at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(f"{target}.part-{os.getpid()}")
        try:
            self._fs.put_file(str(path), str(aside))
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def refresh(self, path: Path, name: str) -> None:
        try:
            os.utime(self._at(name))
        except PermissionError:  # another person's file: only they can change its date
            self.put(path, name)

    def below(self, part: str) -> Iterator[tuple[str, int, dt.datetime]]:
        top = Path(self._at(part))
        for path in [top] if top.is_symlink() or top.is_file() else _walk(top):
            with contextlib.suppress(FileNotFoundError):  # was just removed by somebody else
                facts = path.lstat()
                changed_at = dt.datetime.fromtimestamp(facts.st_mtime, dt.UTC)
                yield path.relative_to(self._root).as_posix(), facts.st_size, changed_at

    def remove(self, part: str, first: Callable[[str], bool]) -> None:
        for name in [name for name, _, _ in self.below(part) if first(name)]:
            Path(self._at(name)).unlink(missing_ok=True)
        remove_tree(Path(self._at(part)))

    def prune(self, part: str) -> None:
        with contextlib.suppress(OSError):  # other files are left
            Path(self._at(part)).rmdir()


def open_files(url: str) -> Bucket:
    """The files below a URL. Raises UsageError for one that can't be opened."""
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
    kinds = [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
    return (Folder if "file" in kinds else Bucket)(filesystem, root.rstrip("/"))


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with all below it. Of a link only the link itself goes."""
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _walk(top: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(top):
        yield from (Path(folder) / name for name in names)
