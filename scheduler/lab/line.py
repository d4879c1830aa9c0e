"""A join line: one word that a person copies to another machine, with the way to the database and a secret; and what
that secret opens, the addresses of the other services with their keys."""

from __future__ import annotations

import base64
import binascii
import getpass
import hashlib
import json
import os
import secrets
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import UsageError
from loractl.common.settings import S3Keys, Settings
from loractl.common.store.roles import LOGIN

from .place import SERVICE_USER

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


_CERTIFICATES = {"database": "sslrootcert", "queue": "ssl_ca_certs"}
"""The option of a service's URL that names its authority."""


@dataclass(frozen=True, kw_only=True)
class LabAddresses:
    """The lab's services. `database_tls`: for connections to the database, without the authority's file."""

    database_tls: Tls
    redis_url: str = field(repr=False)
    artifacts_url: str
    certificates: dict[str, str] = field(default_factory=dict)  # PEM, by service
    s3: S3Keys | None = None
    store_mark: str | None = None

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def read_addresses(text: str) -> LabAddresses:
    """Reads what `text` wrote."""
    fields: dict[str, Any] = json.loads(text)
    s3 = fields.pop("s3")
    return LabAddresses(**fields, s3=None if s3 is None else S3Keys(**s3))


def addresses_of(settings: Settings, server_has_tls: bool, address: str | None) -> LabAddresses:
    """The owner's settings, for others. `address` replaces addresses that lead every machine to itself.

    Raises UsageError if a service is missing, or reachable only from here.
    """
    if settings.redis_url is None:
        raise UsageError("the lab has no queue that others reach", "set LORACTL_REDIS_URL; or lab init --packages")
    certificates = {}
    for service, url in (("database", settings.database_url), ("queue", settings.redis_url)):
        if (file := _option(url, _CERTIFICATES[service])) is not None:
            certificates[service] = _text(Path(file))
    return LabAddresses(
        database_tls=_database_tls(settings.database_url, server_has_tls),
        redis_url=_elsewhere(_without(settings.redis_url, _CERTIFICATES["queue"]), address),
        artifacts_url=settings.artifacts_url,
        certificates=certificates,
        s3=_s3(settings, address) if settings.artifacts_url.startswith("s3://") else None,
    )


def urls_with_certificates(lab: LabAddresses, folder: Path) -> tuple[Tls, str, dict[Path, str]]:
    """Options of the database's URL, the queue's URL, and the files in `folder` that they name."""
    placed = {service: folder / f"{service}-ca.pem" for service in lab.certificates}
    tls, redis_url = lab.database_tls, lab.redis_url
    if (file := placed.get("database")) is not None:
        tls = {**tls, _CERTIFICATES["database"]: str(file)}
    if (file := placed.get("queue")) is not None:
        redis_url += f"{'&' if '?' in redis_url else '?'}{_CERTIFICATES['queue']}={file}"
    return tls, redis_url, {path: lab.certificates[service] for service, path in placed.items()}


def refuse_another_store(lab: LabAddresses) -> None:
    """A folder of this name that is not the lab's would take results that no other box sees. Raises WrongStore."""
    if lab.store_mark is not None and lab.artifacts_url.startswith("file://"):
        ArtifactStore(lab.artifacts_url, mark=lab.store_mark).check()


def _database_tls(url: str, server_has_tls: bool) -> Tls:
    """As the owner asks for it; else bound to the password if the server offers TLS, so that nobody can be in
    between."""
    if (mode := _option(url, "sslmode")) is not None:
        binding = _option(url, "channel_binding")
        return {"sslmode": mode} | ({"channel_binding": binding} if binding else {})
    return {"sslmode": "require", "channel_binding": "require"} if server_has_tls else {}


def _s3(settings: Settings, address: str | None) -> S3Keys:
    env = os.environ
    if env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        keys = S3Keys(
            access_key=env["AWS_ACCESS_KEY_ID"],
            secret_key=env["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"),
            region=env.get("AWS_DEFAULT_REGION") or env.get("AWS_REGION"),
        )
    elif settings.s3 is not None:
        keys = settings.s3
    else:
        raise UsageError(
            "no key of the artifact store is known", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or [s3]"
        )
    return keys if keys.endpoint_url is None else replace(keys, endpoint_url=_elsewhere(keys.endpoint_url, address))


def is_only_here(host: str | None) -> bool:
    """Whether the address leads every machine to itself."""
    return not host or host == "localhost" or host.startswith(("127.", "/")) or host == "::1"


def _elsewhere(url: str, address: str | None) -> str:
    parts = urlsplit(url)
    if address is None or not is_only_here(parts.hostname):
        return url
    user, at, _ = parts.netloc.rpartition("@")
    port = f":{parts.port}" if parts.port else ""
    host = f"[{address}]" if ":" in address else address
    return parts._replace(netloc=f"{user}{at}{host}{port}").geturl()


def _option(url: str, name: str) -> str | None:
    return dict(parse_qsl(urlsplit(url).query)).get(name)


def _without(url: str, name: str) -> str:
    parts = urlsplit(url)
    return parts._replace(query=urlencode([(k, v) for k, v in parse_qsl(parts.query) if k != name], safe="/")).geturl()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}", "an address of a service names it") from error


def right_to_results(artifacts_url: str) -> str:
    """What lets this user write results: a group, if the store is a folder (docs/deploy.md)."""
    if not artifacts_url.startswith("file://"):
        return "ask the lab's owner for its right"
    try:
        group = (Path(unquote(artifacts_url.removeprefix("file://"))) / "jobs").group()
    except (KeyError, OSError):  # the number has no name here, or the folder is closed
        group = SERVICE_USER
    return f"join as root, or be in the group {group}: sudo usermod -aG {group} {getpass.getuser()}, then log in again"
