"""Where this installation keeps its things: one frozen value from the environment, a config file, or defaults."""

from __future__ import annotations

import getpass
import os
import re
import socket
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .channels import Channel, channel_names, read_channels
from .errors import LoractlError, UsageError
from .text import slip_of, without_passwords
from .units import parse_duration, seconds_of, size_of

_KEYS = (
    "database_url", "redis_url", "artifacts_url", "devices", "trainer_ram", "store_patience", "user", "host",
    "model_roots", "trusted_code", "lm_eval_tasks", "max_row", "max_data", "lease", "trainer", "notify",
)  # fmt: skip

OWN_HOME = "set LORACTL_HOME to a folder that you may write"

LEASE_S = 60.0
"""How long an attempt may be silent before its job continues elsewhere, by the database's clock."""

LEAST_LEASE_S = 3.0
"""With less a busy machine would lose its own live attempts."""


def pace_of(lease_s: float) -> float:
    """The factor for a node's own times: with a lease below 30 s its rounds come sooner, and it gives up sooner what it
    waits for, so that it notices a lost worker as late in proportion."""
    return min(1.0, lease_s / 30.0)


MAX_ROW = 16 << 20
"""Bytes of a row: two million words. Reading it takes six times as much memory."""

MAX_DATA = 2 << 30
"""The most bytes to which a parquet file may unpack, and of a .json array, whose rows are all in memory at once."""

TRAINER = "loractl.worker.recipe.trainer"


@dataclass(frozen=True, kw_only=True)
class S3Keys:
    """An account of an S3 server. The AWS_* variables take precedence; they are the only other way to name one."""

    access_key: str
    secret_key: str = field(repr=False)
    endpoint_url: str | None = None  # None: Amazon's own
    region: str | None = None

    def options(self) -> dict[str, Any]:
        """What s3fs takes; nothing where the environment names an account."""
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            return {}
        client = {"client_kwargs": {"region_name": self.region}} if self.region else {}
        endpoint = {"endpoint_url": self.endpoint_url} if self.endpoint_url else {}
        return {"key": self.access_key, "secret": self.secret_key, **endpoint, **client}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every address that loractl uses. URLs may hold passwords, so their repr is hidden: print `redacted(url)`."""

    home: Path
    database_url: str = field(repr=False)
    redis_url: str | None = field(repr=False)  # None: the embedded Valkey under `home`
    artifacts_url: str = field(repr=False)
    devices: str | None  # None: NVML, else the CPU
    store_patience_s: float = 3600.0  # how long fetching and storing are tried again while the artifact store is away
    trainer_ram: int | None = None  # bytes that a training on the CPU may take; None: no limit
    user: str
    host: str  # this box's name in the names of its nodes
    model_roots: tuple[Path, ...] = ()  # a base model's folder must lie in one of them; empty: anywhere
    trusted_code: frozenset[str] = frozenset()  # "owner/model@commit": models with code that this box may run
    lm_eval_tasks: Path | None = None  # the owner's folder of tasks for the lm-eval harness; they may run code
    max_row: int = MAX_ROW  # bytes of one row of a data file
    max_data: int = MAX_DATA  # bytes of what is unpacked from a data file, or read as a whole
    lease_s: float = LEASE_S  # how long an attempt of this box may be silent; its heartbeats follow from it
    trainer: str = TRAINER  # the module that trains, run by `python -m`; it speaks worker/protocol
    notify: tuple[str, ...] = ()  # whom this person's jobs notify if they say nothing themselves
    channels: tuple[Channel, ...] = field(default=(), repr=False)  # to which this box's nodes send
    channels_fault: UsageError | None = field(default=None, repr=False)  # why they can't be read; then there are none
    s3: S3Keys | None = None  # of config.toml; None: the AWS_* variables, or none is needed

    def require_channels(self) -> None:
        """For senders: raises UsageError where config.toml's channels can't be read. Other commands need none."""
        if self.channels_fault is not None:
            raise self.channels_fault

    def require_home(self) -> None:
        """For what keeps files of its own: raises LoractlError where the home can't be written."""
        try:
            make_private(self.home)
            with tempfile.TemporaryFile(dir=self.home):
                pass
        except OSError as error:
            raise LoractlError(f"{self.home} can't be written to: {error.strerror}", OWN_HOME) from error

    @property
    def embedded_database(self) -> bool:
        return self.database_url.startswith("sqlite")

    @property
    def runtime_dir(self) -> Path:
        """Sockets, locks and flags of this box."""
        return self.home / "run"

    @property
    def work_dir(self) -> Path:
        """Scratch space of attempts on this box, one folder a job."""
        return self.home / "work"

    @property
    def cache_dir(self) -> Path:
        """Data sets by content hash and their tokenised form; safe to delete."""
        return self.home / "cache"


def load_settings(environ: dict[str, str] | None = None) -> Settings:
    """Read LORACTL_* from the environment, then `config.toml` in LORACTL_HOME, then defaults.

    Raises UsageError when config.toml can't be read, has an unknown key, or shows a password to others, and for a wrong
    value.
    """
    env = dict(os.environ) if environ is None else environ
    home = Path(env.get("LORACTL_HOME") or "~/.loractl").expanduser().absolute()
    _refuse_no_folder(home)
    file, tables, s3 = _config_file(home / "config.toml")

    channels, channels_fault = _channels(home / "config.toml", tables, env)

    def get(key: str, default: str | None) -> str | None:
        value = env.get(f"LORACTL_{key.upper()}") or file.get(key) or default
        return checked_url(f"LORACTL_{key.upper()}", key, value) if value and key in _URLS else value

    return Settings(
        home=home,
        database_url=_explicit_driver(get("database_url", None) or f"sqlite:///{home / 'loractl.db'}"),
        redis_url=get("redis_url", None),
        artifacts_url=get("artifacts_url", None) or (home / "artifacts").as_uri(),
        devices=get("devices", None),
        store_patience_s=_seconds("store_patience", get("store_patience", None), 3600.0, "0s", "30d"),
        trainer_ram=_size("trainer_ram", get("trainer_ram", None)),
        user=_user(get("user", None) or _login()),
        host=_host(get("host", None) or socket.gethostname()),
        model_roots=_folders("model_roots", get("model_roots", None)),
        trusted_code=_pairs("trusted_code", get("trusted_code", None)),
        lm_eval_tasks=_folder("lm_eval_tasks", get("lm_eval_tasks", None)),
        max_row=_size("max_row", get("max_row", None)) or MAX_ROW,
        max_data=_size("max_data", get("max_data", None)) or MAX_DATA,
        lease_s=_seconds("lease", get("lease", None), LEASE_S, f"{LEAST_LEASE_S:.0f}s", "1h"),
        trainer=_module("trainer", get("trainer", None) or TRAINER),
        notify=channel_names(get("notify", None)),
        channels=channels,
        channels_fault=channels_fault,
        s3=s3,
    )


def mistyped_variables() -> dict[str, str]:
    """Variables that nothing reads, each with the one that was probably meant."""
    known = {key.upper() for key in (*_KEYS, "home")}
    given = [name.removeprefix("LORACTL_") for name in os.environ if name.startswith("LORACTL_")]
    meant = {name: slip_of(name, known) for name in given if name not in known}
    return {f"LORACTL_{name}": f"LORACTL_{close}" for name, close in meant.items() if close}


def _refuse_no_folder(home: Path) -> None:
    """Raises UsageError where a file is in the way; a home that is not there yet is made later."""
    there = next(path for path in (home, *home.parents) if os.path.exists(path))  # noqa: PTH110  Path's raises where one is closed
    if not there.is_dir():
        raise UsageError(
            f"LORACTL_HOME {home} can't be a folder: {there} is none", "name a folder of your own, like ~/.loractl"
        )


def _folders(key: str, text: str | None) -> tuple[Path, ...]:
    """Folders in a list that is separated like PATH."""
    names = [name for name in (text or "").split(os.pathsep) if name]
    if wrong := [name for name in names if not Path(name).is_absolute()]:
        hint = f"like /srv/models{os.pathsep}/data/models"
        raise UsageError(f"LORACTL_{key.upper()}: {wrong[0]} is not an absolute path", hint)
    return tuple(Path(name) for name in names)


def _folder(key: str, text: str | None) -> Path | None:
    if text is not None and not Path(text).is_absolute():
        raise UsageError(f"LORACTL_{key.upper()}: {text} is not an absolute path", "like /srv/lm-eval-tasks")
    return None if text is None else Path(text)


def _pairs(key: str, text: str | None) -> frozenset[str]:
    """Models with the commit that they are trusted at: a name or a branch alone may be other code tomorrow."""
    pairs = [pair.strip() for pair in (text or "").split(",") if pair.strip()]
    if wrong := [pair for pair in pairs if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", pair, re.ASCII)]:
        raise UsageError(
            f"LORACTL_{key.upper()}: {wrong[0]} is not of the form owner/model@commit",
            "the commit is the 40 hex digits of the revision whose code you have read",
        )
    return frozenset(pairs)


def _size(key: str, text: str | None) -> int | None:
    size = None if text is None else size_of(f"LORACTL_{key.upper()}", text)
    if size == 0:
        raise UsageError(f"LORACTL_{key.upper()}: {text!r} is no room at all", "like 6GiB, or leave it out")
    return size


def _seconds(key: str, text: str | None, default: float, least: str, most: str) -> float:
    seconds = default if text is None else seconds_of(f"LORACTL_{key.upper()}", text)
    if not parse_duration(least) <= seconds <= parse_duration(most):
        raise UsageError(f"LORACTL_{key.upper()}: {text!r} is not between {least} and {most}")
    return seconds


def _module(key: str, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII):
        raise UsageError(f"LORACTL_{key.upper()}: {name!r} is not a Python module", f"like {TRAINER}")
    return name


def _user(name: str) -> str:
    """A name that others' tables and terminals can show."""
    if not name.isprintable() or len(name) > 64:
        raise UsageError(f"LORACTL_USER: {name!r} is not a user name", "printable characters, at most 64, like ada")
    return name


def _host(name: str) -> str:
    """A name that can come before the colon of a node's name, and in a table."""
    if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise UsageError(f"LORACTL_HOST: {name!r} is not a host name", "letters, digits, dots and hyphens, like heron")
    return name


def redacted(url: str) -> str:
    """The URL without its user's password, fit for a message or a log."""
    # Not urlsplit: it fails on just those URLs that messages complain about (a bad port, a raw # or / in a password).
    hidden = re.sub(r"^([\w+.-]+://[^:/@]*):.*@", r"\1:***@", url)
    return without_passwords(re.sub(r"([?&]\w*password=)[^&]*", r"\1***", hidden))  # ada@server:secret@db as well


def make_private(folder: Path) -> None:
    """Create a folder, and those above it that are missing, for their owner alone. Raises OSError."""
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def _login() -> str:
    """The login name; a container's user may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


_URLS = {
    "database_url": (
        r"postgres(ql)?(\+psycopg)?://.*|sqlite:///(?!:memory:).+",
        "a PostgreSQL or SQLite database",
        "like postgresql://USER:PASSWORD@HOST/loractl; without it SQLite in LORACTL_HOME",
    ),
    "redis_url": (
        r"rediss?://[^/?]*(/\d*)?(\?.*)?|redis\+socket://([^/?]*@)?/.+",
        "a Redis or Valkey",
        "like redis://:PASSWORD@HOST:6379/0",
    ),
    "artifacts_url": (
        r"file:///.+|s3://[^/?]+.*",
        "a folder or an S3 bucket",
        "like file:///lab/loractl or s3://bucket/loractl",
    ),
    "endpoint_url": (r"https?://[^/?]+.*", "an HTTP server", "like http://10.0.0.5:9000"),
}
"""By key: the URLs that it takes, what they name, and one of them."""


def checked_url(source: str, key: str, url: str) -> str:
    """The URL, if it has the form that its key takes. Raises UsageError; what can't be taken apart is not repeated."""
    form, what, example = _URLS[key]
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = None
    cut = parts is not None and parts.netloc.endswith(":") and "@" not in parts.netloc  # by a slash in a password
    if parts is None or not parts.scheme or cut:
        escaped = "" if key == "artifacts_url" else "; special characters of a password as %XX, a slash as %2F"
        raise UsageError(f"{source} is not a URL", example + escaped)
    if key == "artifacts_url" and _holds_password(url):
        raise UsageError(
            f"{source} holds a password, and it is written into the rows of all jobs",
            "put S3 keys into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if not re.fullmatch(form, url):
        raise UsageError(f"{source} is not the URL of {what}: {redacted(url)}", example)
    return url


def _holds_password(url: str) -> bool:
    return redacted(url) != url


def _explicit_driver(url: str) -> str:
    """SQLAlchemy's `postgresql://` may mean another driver; loractl ships psycopg 3."""
    for prefix in ("postgres://", "postgresql://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def _channels(path: Path, tables: object, env: dict[str, str]) -> tuple[tuple[Channel, ...], UsageError | None]:
    try:
        return read_channels(tables, env), None
    except UsageError as error:
        return (), UsageError(f"{path}: {error.sentence}", error.hint)


def _config_file(path: Path) -> tuple[dict[str, str], object, S3Keys | None]:
    """The values by key, the tables of channels as written there, and the account of S3."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, {}, None
    except PermissionError as error:
        hint = "it is another user's; set LORACTL_HOME, or ask for the right to read it"
        raise UsageError(f"{path} can't be read: {error.strerror}", hint) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} can't be read: {error}", 'it is a TOML file with lines like redis_url = "..."'
        ) from error
    channels: object = values.pop("channels", {})
    s3 = _s3_keys(path, values.pop("s3", None))
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        known = (*_KEYS, "channels", "s3")
        close = slip_of(unknown[0], known)
        hint = f"did you mean {close}?" if close else f"known keys: {', '.join(known)}"
        raise UsageError(f"{path}: unknown key {unknown[0]}", hint)
    texts = {key: str(value) for key, value in values.items()}
    secret = [f"{key} is a URL with a password" for key, text in texts.items() if _holds_password(text)]
    secret += [f"[{table}] may hold passwords" for table, given in (("channels", channels), ("s3", s3)) if given]
    if secret and path.stat().st_mode & 0o077:
        raise UsageError(f"{path}: {secret[0]}, and others can read the file", f"chmod 600 {path}")
    return texts, channels, s3


def _s3_keys(path: Path, table: object) -> S3Keys | None:
    """The table [s3]. Raises UsageError, which repeats no key."""
    if table is None:
        return None
    names = ("access_key", "secret_key", "endpoint_url", "region")
    texts = table if isinstance(table, dict) else {}
    if not {"access_key", "secret_key"} <= set(texts) <= set(names) or not all(
        isinstance(text, str) and text for text in texts.values()
    ):
        hint = f"texts under {', '.join(names)}; the first two must be there"
        raise UsageError(f"{path}: [s3] names no account of an S3 server", hint)
    if "endpoint_url" in texts:
        checked_url(f"{path}: endpoint_url of [s3]", "endpoint_url", texts["endpoint_url"])
    return S3Keys(**texts)
