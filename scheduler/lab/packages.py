"""PostgreSQL and Valkey from the packages of Debian or Ubuntu, set up for a lab: a second run changes nothing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.settings import Settings

from .place import Membership
from .process import run

OWNER = DATABASE = "loractl"
QUEUE_PORT = 6379
_BEGIN, _END = "# loractl lab init: begin\n", "# loractl lab init: end\n"

_POSTGRES = """\
# Written by loractl lab init.
listen_addresses = 'localhost,{address}'
max_connections = 300  # one a card, and what works at the same moment
password_encryption = 'scram-sha-256'
{tls}"""
_POSTGRES_TLS = """\
ssl = on
ssl_cert_file = '{folder}/loractl.pem'
ssl_key_file = '{folder}/loractl.key'
"""
_RULES = """\
# Logins of the lab, from networks that this machine is in, by password and encrypted.
hostssl {database} all samenet scram-sha-256
{networks}"""
_FIND_OWNER = """
SELECT coalesce(rolpassword, 'none') || ' ' || coalesce(shobj_description(oid, 'pg_authid'), '')
  FROM pg_authid WHERE rolname = '{owner}'
"""
_OWNER = """
BEGIN;
SELECT 'CREATE ROLE {owner} LOGIN CREATEROLE' WHERE to_regrole('{owner}') IS NULL \\gexec
{password}
COMMENT ON ROLE {owner} IS '{home}';
COMMIT;
SELECT 'CREATE DATABASE {database} OWNER {owner}'
  WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '{database}') \\gexec
"""
_QUEUE = """\
# Written by loractl lab init.
bind 127.0.0.1 {address}
port 0
tls-port {port}
tls-cert-file {folder}/loractl.pem
tls-key-file {folder}/loractl.key
tls-auth-clients no
requirepass {password}
appendonly yes
maxmemory-policy noeviction
"""


@dataclass(frozen=True, kw_only=True)
class ServerBox:
    """What the services of this machine should be. `networks`: further networks from which logins come.

    `take_over`: services that were here before lab init may be set up for the lab.
    """

    address: str
    artifacts_url: str
    networks: tuple[str, ...] = ()
    take_over: bool = False


@dataclass(frozen=True, kw_only=True)
class _Queue:
    """Valkey, or Redis if the distribution has no Valkey."""

    name: str  # valkey or redis

    @property
    def package(self) -> str:
        return f"{self.name}-server"

    @property
    def folder(self) -> Path:
        return Path("/etc") / self.name

    @property
    def file(self) -> Path:
        """What lab init wrote; without it the service was here before."""
        return self.folder / "loractl.conf"


@dataclass(frozen=True, kw_only=True)
class _Owner:
    """The owner of the tables. `is_set`: the server has this password; `lost`: it has another, which nobody knows."""

    password: str = field(repr=False)
    is_set: bool = False
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """A PostgreSQL cluster of this machine, in Debian's sense."""

    version: str
    name: str
    port: int
    online: bool

    @property
    def folder(self) -> Path:
        return Path("/etc/postgresql") / self.version / self.name

    @property
    def file(self) -> Path:
        """What lab init wrote; without it the cluster was here before."""
        return self.folder / "conf.d" / "loractl.conf"


def install_services(box: ServerBox, settings: Settings) -> tuple[Membership, tuple[str, ...]]:
    """Install and set up both. Returns what the owner's config.toml needs, and sentences on what was done.

    Passwords in use stay. Raises UsageError if it can't work, WrongState if another home made the lab, LoractlError for
    a failing command.
    """
    _refuse_elsewhere(box.address)
    queue = _Queue(name="valkey" if _candidate("valkey-server") else "redis")
    if not box.take_over:
        _refuse_foreign(_cluster(), queue)
    owner = _owner(_cluster(), settings)
    wanted = ["postgresql", queue.package, "openssl"]
    if missing := [name for name in wanted if not _installed(name)]:
        run("apt-get", "install", "--yes", "--no-install-recommends", *missing, DEBIAN_FRONTEND="noninteractive")
    cluster = _set_up_postgres(box)
    _make_owner(cluster.port, owner, settings.home)
    queue_password = _queue_password(queue) or _kept(settings.redis_url or "", None) or secrets.token_hex(24)
    certificate = _set_up_queue(queue, box.address, queue_password)
    host = f"[{box.address}]" if ":" in box.address else box.address
    options = "sslmode=require&channel_binding=require"
    entry = Membership(
        database_url=f"postgresql://{OWNER}:{owner.password}@{host}:{cluster.port}/{DATABASE}?{options}",
        redis_url=f"rediss://:{queue_password}@{host}:{QUEUE_PORT}/0?ssl_ca_certs={settings.home}/queue-ca.pem",
        artifacts_url=box.artifacts_url,
        files={settings.home / "queue-ca.pem": certificate},
    )
    done = f"PostgreSQL {cluster.version} and {queue.package} listen on {box.address}, encrypted."
    return entry, (done, *(["The owner's password is new: config.toml no longer had it."] if owner.lost else []))


def _refuse_elsewhere(address: str) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        hint = (
            "as root on Debian or Ubuntu; elsewhere set LORACTL_DATABASE_URL and LORACTL_REDIS_URL of servers of yours"
        )
        raise UsageError("--packages installs packages with apt-get", hint)
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        raise UsageError(
            f"{address} is not an address of this machine",
            "the one by which other boxes reach it, like 10.0.0.5: ip address",
        ) from None


def _refuse_foreign(cluster: _Cluster | None, queue: _Queue) -> None:
    """Raises UsageError for services that somebody else may use."""
    here = [f"PostgreSQL {cluster.version}/{cluster.name}"] if cluster is not None and not cluster.file.exists() else []
    here += [queue.package] if _installed(queue.package) and not queue.file.exists() else []
    if here:
        were, they, them = ("were", "they listen", "them") if here[1:] else ("was", "it listens", "it")
        change = f"lab init would change where {they} and who gets in, and restart {them}"
        other = "without --packages LORACTL_DATABASE_URL and LORACTL_REDIS_URL name the lab's"
        raise UsageError(
            f"{' and '.join(here)} {were} here before: {change}", f"--take-over if nothing else uses {them}; {other}"
        )


def _owner(cluster: _Cluster | None, settings: Settings) -> _Owner:
    """Only the home that made the lab may replace a lost password. Raises WrongState for another."""
    kept = _kept(settings.database_url, OWNER)
    found = "" if cluster is None else _psql(_started(cluster).port, _FIND_OWNER.format(owner=OWNER))
    if not found:
        return _Owner(password=kept or secrets.token_hex(24))
    verifier, _, home = found.partition(" ")
    if kept is not None and _is_password_of(verifier, kept):
        return _Owner(password=kept, is_set=True)
    if home != str(settings.home):
        hint = f"LORACTL_HOME={home} has it" if home else "set LORACTL_HOME to the folder that has it"
        raise WrongState(f"this machine has a lab, and {settings.home} lacks its owner's password", hint)
    return _Owner(password=secrets.token_hex(24), lost=True)


def _candidate(package: str) -> bool:
    if not (told := run("apt-cache", "policy", package)):
        run("apt-get", "update")
        told = run("apt-cache", "policy", package)
    return bool(told) and "Candidate: (none)" not in told


def _installed(package: str) -> bool:
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package], capture_output=True, text=True
    )
    return done.stdout == "installed"


def _set_up_postgres(box: ServerBox) -> _Cluster:
    """Write the cluster's files, and restart it if one changed."""
    if (cluster := _cluster()) is None:
        versions = sorted((p.name for p in Path("/usr/lib/postgresql").iterdir()), key=float)
        run("pg_createcluster", versions[-1], "main")
        cluster = _cluster()
        assert cluster is not None  # it ended with 0
    folder = cluster.folder
    rules = _RULES.format(
        database=DATABASE, networks="".join(f"hostssl {DATABASE} all {net} scram-sha-256\n" for net in box.networks)
    )
    tls = ""
    if not re.search(r"^\s*ssl\s*=\s*on", (folder / "postgresql.conf").read_text(), re.MULTILINE):
        _certificate(folder, "postgres", box.address)
        tls = _POSTGRES_TLS.format(folder=folder)
    changed = _write(cluster.file, _POSTGRES.format(address=box.address, tls=tls), "postgres")
    changed |= _write(folder / "pg_hba.conf", _with_block(folder / "pg_hba.conf", rules), "postgres")
    if changed and cluster.online:
        run("pg_ctlcluster", cluster.version, cluster.name, "restart")
    return _started(cluster)


def _cluster() -> _Cluster | None:
    """Of the clusters whose server is installed, the lab's, else the newest."""
    if shutil.which("pg_lsclusters") is None:
        return None
    rows = [line.split() for line in run("pg_lsclusters", "--no-header").splitlines()]
    clusters = [
        _Cluster(version=row[0], name=row[1], port=int(row[2]), online=row[3] == "online")
        for row in rows
        if "binaries_missing" not in row[3]
    ]
    return max(clusters, key=lambda one: (one.file.exists(), float(one.version)), default=None)


def _started(cluster: _Cluster) -> _Cluster:
    if cluster.online:
        return cluster
    run("pg_ctlcluster", cluster.version, cluster.name, "start")
    return replace(cluster, online=True)


def _make_owner(port: int, owner: _Owner, home: Path) -> None:
    """The role may make roles, and is no superuser; its comment remembers its home.

    The statement contains only the password's verifier.
    """
    changed = "" if owner.is_set else f"ALTER ROLE {OWNER} PASSWORD '{scram_verifier(owner.password)}';"
    remembered = str(home).replace("'", "''")
    _psql(port, _OWNER.format(owner=OWNER, database=DATABASE, password=changed, home=remembered))


def _psql(port: int, statements: str) -> str:
    """What the statements return, run as the server's superuser."""
    return run(
        "runuser", "-u", "postgres", "--", "psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align",
        "--set=ON_ERROR_STOP=1", f"--port={port}", "--dbname=postgres", "--file=-",
        stdin=statements,
    )  # fmt: skip


def scram_verifier(password: str, salt: bytes | None = None, rounds: int = 4096) -> str:
    """What PostgreSQL stores instead of an ASCII password (RFC 5802, RFC 7677)."""
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, rounds)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    salt_, stored_, server = (
        base64.b64encode(part).decode() for part in (salt, stored, hmac.digest(salted, b"Server Key", "sha256"))
    )
    return f"SCRAM-SHA-256${rounds}:{salt_}${stored_}:{server}"


def _is_password_of(verifier: str, password: str) -> bool:
    parts = re.match(r"SCRAM-SHA-256\$(\d+):([^$]+)\$", verifier)
    return parts is not None and scram_verifier(password, base64.b64decode(parts[2]), int(parts[1])) == verifier


def _queue_password(queue: _Queue) -> str | None:
    """The one that is in use."""
    text = queue.file.read_text() if queue.file.exists() else ""
    found = re.search(r"^requirepass (\S+)$", text, re.MULTILINE)
    return found[1] if found else None


def _set_up_queue(queue: _Queue, address: str, password: str) -> str:
    """Write its file and its certificate, and restart it if one changed; returns the certificate (PEM)."""
    certificate = _certificate(queue.folder, queue.name, address)
    text = _QUEUE.format(address=address, port=QUEUE_PORT, folder=queue.folder, password=password)
    changed = _write(queue.file, text, queue.name)
    main = queue.folder / f"{queue.name}.conf"
    changed |= _write(main, _with_block(main, f"include {queue.file}\n", at_end=True), queue.name)
    if changed or not _listens(address):
        run("service", queue.package, "restart")
        _wait_for(address)
    return certificate


def _certificate(folder: Path, group: str, address: str) -> str:
    """A self-signed certificate for ten years; joined machines get the queue's, and trust no other."""
    file, key, made_for = (folder / f"loractl.{part}" for part in ("pem", "key", "names"))
    kind = "IP" if re.fullmatch(r"[0-9.]+|.*:.*", address) else "DNS"
    names = f"{kind}:{address},DNS:{socket.gethostname()},DNS:localhost,IP:127.0.0.1"
    if not (file.exists() and key.exists() and made_for.exists() and made_for.read_text() == names):
        run(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
            "3650", "-subj", "/CN=loractl", "-addext", f"subjectAltName={names}",
            "-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-keyout", str(key), "-out", str(file),
        )  # fmt: skip
        made_for.write_text(names)
    shutil.chown(key, "root", group)
    key.chmod(0o640)
    return file.read_text()


def _listens(address: str) -> bool:
    try:
        with socket.create_connection((address, QUEUE_PORT), timeout=1):
            return True
    except OSError:
        return False


def _wait_for(address: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not _listens(address):
        if time.monotonic() > deadline:
            raise LoractlError(f"the queue does not listen on {address}:{QUEUE_PORT}", "its log is in /var/log")
        time.sleep(0.1)


def _kept(url: str, user: str | None) -> str | None:
    """The existing password, so that boxes that use it continue to work."""
    parts = urlsplit(url)
    return parts.password if parts.username in (user, "" if user is None else user) else None


def _with_block(file: Path, block: str, at_end: bool = False) -> str:
    """The file with our lines in place of our earlier ones; at its beginning unless later lines win."""
    text = file.read_text()
    others = re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", "", text, flags=re.DOTALL)
    ours = _BEGIN + block + _END
    return others.rstrip("\n") + "\n" + ours if at_end else ours + others


def _write(file: Path, text: str, group: str) -> bool:
    """Whether this changed it. Only its owner and group may read it: it may hold a password."""
    if file.exists() and file.read_text() == text:
        return False
    aside = file.with_name(f".{file.name}.new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640), "w") as stream:
        stream.write(text)
    owner = file.owner() if file.exists() else "root"
    shutil.chown(aside, owner, group)
    aside.replace(file)
    return True
