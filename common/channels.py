"""Channels: where messages go, as a box's config.toml names them. A job names a channel, never an address."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .errors import UsageError

ME = "me"
"""In a job's `notify`: the channels that list its user among their `users`."""

LAB = "lab"
"""The channels with `lab = true`, which get messages about boxes and cards."""

VARIABLES = "LORACTL_CHANNEL_"
"""The prefix of variables with channels' secrets; trainers and commands don't get them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9.-]+", re.ASCII)
_COMMON = {"kind", "users", "lab"}
_KEYS = {  # by kind: required keys, optional keys
    "webhook": ({"url", "secret"}, set[str]()),
    "ntfy": ({"url"}, {"token"}),
    "slack": ({"url"}, set[str]()),
    "discord": ({"url"}, set[str]()),
    "mail": ({"url", "from", "to"}, set[str]()),
    "command": ({"command"}, set[str]()),
}
_SCHEMES = {"mail": ("smtp", "smtps", "smtp+starttls")}


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One way to reach people. Addresses may be secrets, so their repr is hidden."""

    name: str
    kind: str  # a key of _KEYS
    url: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)  # signs a webhook, or opens an ntfy topic
    sender: str = ""  # of mail
    to: tuple[str, ...] = ()
    command: tuple[str, ...] = field(default=(), repr=False)
    users: frozenset[str] = frozenset()  # whose `me` means this channel
    lab: bool = False
    missing: str = ""  # the variable that this process lacks, so that it can't send there


def read_channels(tables: object, environ: Mapping[str, str]) -> tuple[Channel, ...]:
    """The channels of config.toml's [channels.NAME] tables. Raises UsageError, without repeating a value."""
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UsageError("channels: is not a table of channels", "write [channels.NAME] and below it kind = ...")
    return tuple(_read(name, table, environ) for name, table in tables.items())


def channel_names(text: str | None) -> tuple[str, ...]:
    """The names in a comma-separated list. Raises UsageError."""
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if wrong := [name for name in names if not _NAME.fullmatch(name)]:
        raise UsageError(f"LORACTL_NOTIFY: {wrong[0]!r} is not a channel name", "names of channels, or me, like me,ops")
    return names


def names_in(spec: object) -> tuple[str, ...]:
    """The channels that a stored spec names; a row that this version can't read names none."""
    names = spec.get("notify") if isinstance(spec, dict) else None
    listed = names if isinstance(names, list) else []
    return tuple(n for n in listed if isinstance(n, str) and _NAME.fullmatch(n) and n != LAB)


def channels_of(channels: Iterable[Channel], user: str) -> tuple[str, ...]:
    """What `me` means for a user."""
    return tuple(channel.name for channel in channels if user in channel.users)


def unknown_names(names: Iterable[str] | None, channels: Iterable[Channel], user: str) -> list[str]:
    """A warning for each name that this machine's channels lack; none if it has no channels: other boxes send then."""
    known = {channel.name: channel for channel in channels}
    if not known:
        return []
    lacking = [name for name in names or () if name not in known and name != ME]
    lines = [f"no channel {name}, it has {', '.join(known)}" for name in lacking]
    if ME in (names or ()) and not channels_of(known.values(), user):
        lines.append(f"no channel with {user} among its users, which {ME} means")
    return [f"Warning: notify: this machine's config.toml has {line}; another box must have it." for line in lines]


def _read(name: str, table: Mapping[str, Any], environ: Mapping[str, str]) -> Channel:
    """The channel, with $LORACTL_CHANNEL_... replaced: a trainer may read its user's files, but not that variable.

    A process without the variable can't send there, but still does its other work, like a person's command.
    """
    filled = dict(table)
    for key in ("url", "secret", "token"):
        value = table.get(key)
        if isinstance(value, str) and value.startswith("$"):
            variable = value[1:]
            if not variable.startswith(VARIABLES):
                raise UsageError(
                    f"channels.{name}: {key} names a variable of another kind", f"its name begins with {VARIABLES}"
                )
            if not environ.get(variable):
                return Channel(name=name, kind=str(table.get("kind")), missing=variable)
            filled[key] = environ[variable]
    return _channel(name, filled)


def _channel(name: str, table: Mapping[str, Any]) -> Channel:
    def refuse(what: str, hint: str = "") -> UsageError:
        return UsageError(f"channels.{name}: {what}", hint or "docs/notifications.md shows one of each kind")

    if not _NAME.fullmatch(name) or name in (ME, LAB):
        raise refuse("is not a channel name", f"letters, digits, dots and hyphens, and neither {ME} nor {LAB}")
    kind = table.get("kind")
    if kind not in _KEYS:
        raise refuse("its kind is not known", f"one of {', '.join(_KEYS)}")
    needed, maybe = _KEYS[kind]
    if missing := sorted(needed - table.keys()):
        raise refuse(f"{missing[0]} is missing")
    if unknown := sorted(table.keys() - needed - maybe - _COMMON):
        raise refuse(f"unknown key {unknown[0]}", f"known keys: {', '.join(sorted(needed | maybe | _COMMON))}")
    lists = {key: _texts(table.get(key, [])) for key in ("users", "to", "command")}
    if wrong := [key for key, texts in lists.items() if texts is None or (key in needed and not texts)]:
        raise refuse(f"{wrong[0]} is not a list of texts")
    texts = {key: table.get(key, "") for key in ("url", "secret", "token", "from")}
    if wrong := [key for key, text in texts.items() if not (isinstance(text, str) and text.isascii() and _plain(text))]:
        raise refuse(f"{wrong[0]} is not plain text")
    if not isinstance(table.get("lab", False), bool):
        raise refuse("lab is neither true nor false")
    if "url" in needed and not _fits(kind, texts["url"]):
        raise refuse("url is not an address of its kind", f"it begins with {' or '.join(_schemes(kind))}")
    if kind == "mail" and (wrong := [a for a in (texts["from"], *(lists["to"] or ())) if not _ADDRESS.fullmatch(a)]):
        raise refuse(f"{wrong[0]!r} is not a mail address", "like ada@lab.example")
    if kind == "webhook" and signing_key(texts["secret"]) is None:
        raise refuse("secret is not a webhook's", "whsec_ and 24 to 64 random bytes in base64")
    return Channel(
        name=name,
        kind=kind,
        url=texts["url"],
        secret=texts["secret"] or texts["token"],
        sender=texts["from"],
        to=lists["to"] or (),
        command=lists["command"] or (),
        users=frozenset(lists["users"] or ()),
        lab=table.get("lab", False),
    )


def signing_key(secret: str) -> bytes | None:
    """The bytes of a Standard Webhooks secret; None if it is not one (https://www.standardwebhooks.com)."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (ValueError, binascii.Error):
        return None
    return key if secret.startswith("whsec_") and 24 <= len(key) <= 64 else None


def _plain(text: str) -> bool:
    return text.isprintable() and text == text.strip()


def _texts(value: object) -> tuple[str, ...] | None:
    """A list of texts without control characters, or None."""
    if not isinstance(value, list) or not all(isinstance(text, str) and text.isprintable() for text in value):
        return None
    return tuple(value)


def _schemes(kind: str) -> tuple[str, ...]:
    return tuple(f"{scheme}://" for scheme in _SCHEMES.get(kind, ("https", "http")))


def _fits(kind: str, url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    if kind != "mail" and "@" in parts.netloc:
        return False  # a login that would not be used
    if (
        kind == "mail"
        and parts.password
        and parts.scheme == "smtp"
        and parts.hostname not in ("localhost", "127.0.0.1")
    ):
        return False  # a password in the clear
    if kind == "ntfy" and not re.fullmatch(r"/[\w-]{1,64}", parts.path, re.ASCII):
        return False
    return url.startswith(_schemes(kind)) and bool(parts.hostname) and " " not in url
