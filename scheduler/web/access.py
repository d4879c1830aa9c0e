"""Who may look: only this machine, or anyone with the token; and the names under which the server may be called."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from loractl.common.errors import LoractlError, UsageError
from loractl.common.listener import address_of, host_name
from loractl.common.settings import make_private

TOKEN_BYTES = 32
TOKEN_FILE = "web-token"  # noqa: S105  a file's name


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a request must show."""

    token: str | None  # None: nothing, the server listens on this machine's own address
    names: frozenset[str]  # host names by which it may be called, besides addresses

    def knows(self, hosts: Sequence[str]) -> bool:
        """Whether the Host headers name us. An address is no name that a stranger's DNS could point here."""
        name = host_name(hosts)
        address = address_of(name)
        if address is None:
            return name in self.names
        return address.is_loopback if self.token is None else True

    def admits(self, token: str) -> bool:
        """Whether it is the token. Takes the same time for every wrong token."""
        return self.token is None or hmac.compare_digest(token.encode(), self.token.encode())

    def admits_cookie(self, value: str) -> bool:
        """Whether it is the cookie value for the token."""
        return self.token is None or hmac.compare_digest(value.encode(), self.cookie.encode())

    @property
    def cookie(self) -> str:
        """The value of the browser's cookie, which does not reveal the token."""
        return sha256(f"loractl web cookie {self.token}".encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. Raises UsageError for anything else."""
    if host == "localhost":
        return True
    address = address_of(host)
    if address is None:
        raise UsageError(f"--host {host!r} is not an address", "like 127.0.0.1, or 0.0.0.0 for all of this machine")
    return address.is_loopback


def access_to(host: str, home: Path, more_names: Iterable[str], *, always: bool) -> Access:
    """What a server on this address asks for: nothing on a loopback address, unless `always`; else the home's token."""
    names = {"localhost", *(name.lower().rstrip(".") for name in more_names)}
    if is_loopback(host) and not always:
        return Access(token=None, names=frozenset(names))
    own = socket.gethostname().lower()
    return Access(token=home_token(home), names=frozenset({*names, own, own.partition(".")[0]}))


def home_token(home: Path) -> str:
    """The token of a home, drawn on first use. Raises LoractlError."""
    path = home / TOKEN_FILE
    try:
        make_private(home)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(TOKEN_BYTES) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise LoractlError(f"{path} can't be made: {error.strerror}", "set LORACTL_HOME") from error
    if path.stat().st_mode & 0o077:
        raise LoractlError(f"{path} holds the token, and others can read it", f"delete it: a new one is drawn; {path}")
    token = path.read_text("utf-8").strip()
    if len(token) < TOKEN_BYTES:
        raise LoractlError(f"{path} holds no token", "delete it: a new one is drawn")
    return token
