"""A join line: one word that a person copies to another machine, with the way to the database and a secret."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from loractl.common.errors import UsageError
from loractl.common.store.entrance import LOGIN

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

_MARK = "join-"
_FORM = 2
"""Version 1 sealed addresses in another way."""
_HINT = "copy all of it, as printed; on the server box loractl lab invite prints another one"

Tls = dict[str, str]
"""libpq's options of a connection's encryption, like sslmode."""


@dataclass(frozen=True, kw_only=True)
class JoinLine:
    """Where the database is, and the secret from which the line's password and the key of its addresses follow.

    With `tls` the connection is encrypted, and with channel_binding it ends at the server that knows the password:
    nobody between can read it or answer in its place, though no certificate is known here.
    """

    host: str  # or the directory of a unix socket
    port: int
    database: str
    number: str  # 12 hex digits
    secret: str = field(repr=False)
    tls: Tls

    @property
    def login(self) -> str:
        return LOGIN + self.number

    @property
    def password(self) -> str:
        return self._derived(b"password").hex()

    def seal(self, text: str) -> str:
        """The text, encrypted by a key that only the line has: the server never has it."""
        return self._fernet().encrypt(text.encode()).decode()

    def unseal(self, sealed: str) -> str:
        """The text. Raises ValueError if it was sealed for another line, or changed."""
        fernet = self._fernet()
        from cryptography.fernet import InvalidToken

        try:
            return fernet.decrypt(sealed).decode()
        except InvalidToken as error:
            raise ValueError("sealed for another line, or changed") from error

    def _fernet(self) -> Fernet:
        try:
            from cryptography.fernet import Fernet  # only init and join need it
        except ModuleNotFoundError as error:
            raise UsageError("cryptography is not installed", "pip install 'loractl[postgres]'") from error
        return Fernet(base64.urlsafe_b64encode(self._derived(b"seal")))

    def _derived(self, use: bytes) -> bytes:
        return hashlib.blake2b(self.secret.encode(), person=use, digest_size=32).digest()

    def url(self, login: str, password: str, tls: Tls) -> str:
        """The database's address for a login."""
        socket = self.host.startswith("/")
        place = "" if socket else f"[{self.host}]" if ":" in self.host else self.host
        options = {**({"host": self.host, "port": str(self.port)} if socket else {}), **tls}
        query = "&".join(f"{name}={quote(value, safe='/')}" for name, value in options.items())
        port = "" if socket else f":{self.port}"
        return f"postgresql://{login}:{password}@{place}{port}/{quote(self.database)}" + (f"?{query}" if query else "")

    def text(self) -> str:
        """One word of letters, digits, '-' and '_', safe in every shell; it ends with a check of the rest."""
        fields = [_FORM, self.host, self.port, self.database, self.number, self.secret, self.tls]
        raw = json.dumps(fields, separators=(",", ":")).encode()
        return _MARK + base64.urlsafe_b64encode(raw + _check(raw)).decode().rstrip("=")


def new_secret() -> tuple[str, str]:
    """A number and a secret for a line: 48 bits that name it, 192 that nobody guesses."""
    return secrets.token_hex(6), secrets.token_urlsafe(24)


def read_line(text: str) -> JoinLine:
    """The line as somebody pasted it, maybe over several lines. Raises UsageError, which repeats nothing of it."""
    word = "".join(text.split()).removeprefix("loractljoin")
    if not word.startswith(_MARK):
        raise UsageError(f"this is not a join line: those begin with {_MARK}", _HINT)
    body = word.removeprefix(_MARK)
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("this join line is damaged", _HINT) from None
    if len(raw) < 5 or _check(raw[:-4]) != raw[-4:]:
        raise UsageError("this join line is damaged, or its end is missing", _HINT)
    fields = json.loads(raw[:-4])
    if fields[0] != _FORM:
        raise UsageError("this join line is of another version of loractl", "install the same version here")
    _, host, port, database, number, secret, tls = fields
    return JoinLine(host=host, port=port, database=database, number=number, secret=secret, tls=tls)


def _check(raw: bytes) -> bytes:
    """Finds copying errors; it is no protection."""
    return zlib.crc32(raw).to_bytes(4, "big")
