"""What a box or a person needs from a lab besides a login: the other services, and their keys."""

from __future__ import annotations

import getpass
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import UsageError
from loractl.common.settings import S3Keys, Settings

from .line import Tls
from .place import SERVICE_USER

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
    return parts._replace(netloc=f"{user}{at}{address}{port}").geturl()


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
