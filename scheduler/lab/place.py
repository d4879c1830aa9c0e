"""Where a joined machine keeps the lab's addresses: config.toml of a home, or a service's environment file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.settings import S3Keys, make_private

SERVICE_FOLDER, SERVICE_HOME, SERVICE_USER = Path("/etc/loractl"), Path("/var/lib/loractl"), "loractl"
"""Of a box's worker that systemd runs; loractl-worker.service names the same."""

_KEYS = {"database_url": "LORACTL_DATABASE_URL", "redis_url": "LORACTL_REDIS_URL",
         "artifacts_url": "LORACTL_ARTIFACTS_URL", "host": "LORACTL_HOST"}  # fmt: skip
_S3 = {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY", "endpoint_url": "AWS_ENDPOINT_URL",
       "region": "AWS_DEFAULT_REGION"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What to write about a lab. `host`: of a box."""

    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    artifacts_url: str
    host: str | None = None
    s3: S3Keys | None = None
    files: dict[Path, str] = field(default_factory=dict)  # next to it: certificates, for everybody to read

    def settings(self) -> dict[str, str]:
        """By the names of config.toml."""
        return {name: value for name in _KEYS if (value := getattr(self, name)) is not None}

    def account(self) -> dict[str, str]:
        """The account of S3, by the names of [s3]."""
        return {name: value for name, value in vars(self.s3).items() if value} if self.s3 else {}

    def variables(self) -> dict[str, str]:
        """By the names of the environment."""
        keys = {_KEYS[name]: value for name, value in self.settings().items()}
        return {**keys, **{_S3[name]: value for name, value in self.account().items()}}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A machine's own file for a lab. `service`: an environment file that only root reads, for systemd."""

    folder: Path
    home: Path
    service: bool

    @property
    def file(self) -> Path:
        return self.folder / ("worker.env" if self.service else "config.toml")

    def refuse_joined(self, replace: bool) -> None:
        """Raises WrongState if the machine is in a lab, or its environment names one: that overrides the file."""
        named = [name for name in _KEYS.values() if name != "LORACTL_HOST" and os.environ.get(name)]
        if named and not self.service:
            raise WrongState(f"{named[0]} is set here and overrides {self.file}", f"unset {' '.join(named)}")
        if not replace and re.search(r"^(database_url|LORACTL_DATABASE_URL)\s*=", self._text(), re.MULTILINE):
            raise WrongState(f"this machine is in a lab: {self.file}", "loractl join --replace leaves that lab")

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        """What a command needs to work here with these variables, whether or not anything is written yet."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
        devices = {k: v for k, v in os.environ.items() if k in ("LORACTL_DEVICES", "LORACTL_MODEL_ROOTS")}
        user = {"HOME": str(self.home), "USER": SERVICE_USER, "LOGNAME": SERVICE_USER} if self.service else {}
        return {**kept, **user, **devices, "LORACTL_HOME": str(self.home), **variables}

    def variables(self) -> dict[str, str]:
        """What a service's file says, as systemd reads it. Raises UsageError without one, LoractlError."""
        if not (text := self._text()):
            raise UsageError(f"there is no {self.file}", "loractl join, as root on a GPU box, writes it")
        pairs = (line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))
        return {name: " ".join(shlex.split(value)) for name, value in pairs}

    @contextlib.contextmanager
    def prepared(self, entry: Membership) -> Iterator[None]:
        """Write everything to temporary files; move them into place if the body succeeds, and remove them if it does
        not.

        Raises LoractlError when it can't be written.
        """
        new = {**entry.files, self.file: self._env(entry) if self.service else self._toml(entry)}
        aside = {path: path.with_name(f".{path.name}.new") for path in new}
        try:
            try:
                if self.service:
                    self.folder.mkdir(mode=0o755, exist_ok=True)
                else:
                    make_private(self.folder)
                for path, text in new.items():
                    _write(aside[path], text, 0o600 if path == self.file else 0o644)
            except OSError as error:
                raise LoractlError(f"{self.folder} can't be written: {error.strerror}", "set LORACTL_HOME") from error
            yield
            for path in new:
                aside[path].replace(path)
        finally:
            for path in aside.values():
                path.unlink(missing_ok=True)

    def _text(self) -> str:
        try:
            return self.file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise LoractlError(f"{self.file} can't be read: {error.strerror}", "whose is it?") from error

    def _env(self, entry: Membership) -> str:
        """The file with the entry's variables in place of its own; other lines stay."""
        ours = "|".join({*_KEYS.values(), *_S3.values()})
        kept = re.sub(rf"^({ours})=.*\n?", "", self._text(), flags=re.MULTILINE).replace(_HEAD, "")
        return _HEAD + "".join(f"{k}={json.dumps(v)}\n" for k, v in entry.variables().items()) + kept

    def _toml(self, entry: Membership) -> str:
        """The file with the entry's keys before all tables, and its account as [s3]; other lines stay."""
        old = self._text().replace(_HEAD, "")
        head, tables = ([*re.split(r"^(?=\s*\[)", old, maxsplit=1, flags=re.MULTILINE), ""])[:2]
        head = re.sub(rf"^\s*({'|'.join(_KEYS)})\s*=.*\n?", "", head, flags=re.MULTILINE)
        tables = re.sub(r"^\s*\[s3\][^\[]*", "", tables, flags=re.MULTILINE)
        ours = "".join(f"{k} = {json.dumps(v)}\n" for k, v in entry.settings().items())
        account = "".join(f"{k} = {json.dumps(v)}\n" for k, v in entry.account().items())
        text = _HEAD + ours + head + tables + (f"\n[s3]\n{account}" if account else "")
        tomllib.loads(text)
        return text


def _write(path: Path, text: str, mode: int) -> None:
    """A new file on the disk, with this mode from the start, whatever the umask."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


SERVICE = Place(folder=SERVICE_FOLDER, home=SERVICE_HOME, service=True)
_HEAD = "# The lab's addresses, with passwords: loractl join has written them.\n"
