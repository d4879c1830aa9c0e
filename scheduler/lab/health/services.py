"""The condition of the services: the database, its tables and its clock, the queue, the artifact store, the boxes, and
messages that could not be sent anywhere.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from loractl import __version__
from loractl.common.artifacts import ArtifactStore, checkpoint_prefix, open_store
from loractl.common.errors import ArtifactError, LoractlError, WrongStore
from loractl.common.lab_store import SETTING, folder_of, is_home_s, known_mark
from loractl.common.settings import OWN_HOME, Settings, redacted
from loractl.common.store.database import has_database, one_look
from loractl.common.store.roles import has_roles, unbounded
from loractl.common.store.schema import HEAD, OLDEST, mismatch, revision
from loractl.common.store.store import Store
from loractl.common.units import duration
from loractl.scheduler.fleet.answer import DeviceState

from .condition import Condition, broken, fine, skipped, warning


def see_messages(settings: Settings) -> Iterator[Condition]:
    """Messages that no worker takes, and those given up in the last day."""
    if (fault := settings.channels_fault) is not None:
        yield broken("messages", fault.sentence, fault.hint)
    with one_look(settings) as engine:
        stuck = Store(engine).outbox.stuck()
    for pile in stuck:
        several = f"{pile.count} message{'s' * (pile.count != 1)} to channel {pile.channel}"
        if pile.outcome is None:
            hint = "a GPU box must have the channel in its config.toml, and its worker be started since then"
            yield warning(
                "messages", f"{several}, due since {pile.at:%Y-%m-%d %H:%M} UTC: no worker has that channel", hint
            )
        else:
            yield warning("messages", f"{several}, the last at {pile.at:%Y-%m-%d %H:%M} UTC: {pile.outcome}")
    for channel in settings.channels:
        if channel.missing:
            yield warning("messages", f"channel {channel.name}: {channel.missing} is not set here")
    if not stuck and fault is None:
        names = ", ".join(channel.name for channel in settings.channels)
        here = f"channels of this machine: {names}" if names else "this machine has no channels"
        yield fine("messages", f"none is stuck; {here}")


CLOCK_WARNING_S, CLOCK_ERROR_S = 5.0, 900.0
"""Seconds between this machine's clock and the database's: S3 refuses requests signed 15 minutes off."""

NO_JOB = 10**18 - 1
"""Beyond the numbers that a database gives: what a check stores belongs to no job."""


def see_database(settings: Settings) -> Iterator[Condition]:
    """Whether it answers, and takes writes."""
    address = redacted(settings.database_url)
    file = Path(settings.database_url.removeprefix("sqlite:///")) if settings.embedded_database else None
    if file is not None and not file.exists():
        yield skipped("database", f"there is none yet: {address}", "loractl submit job.yaml makes it")
        return
    if file is not None and not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        yield broken("database", f"SQLite's file can only be read: {address}", OWN_HOME)
        return
    with one_look(settings) as engine:
        began = time.monotonic()
        writes = Store(engine).takes_writes()
        took, version = _ms(began), ".".join(map(str, engine.dialect.server_version_info or ()))
        kind = "SQLite" if settings.embedded_database else "PostgreSQL"
        if writes:
            yield fine("database", f"{kind} {version} answers in {took}: {address}")
        else:
            hint = "LORACTL_DATABASE_URL must name the primary; after a failover that is another server"
            yield broken("database", f"{kind} {version} only reads: {address}", hint)


def see_revision(settings: Settings) -> Iterator[Condition]:
    """Whether the tables have this version's form."""
    with one_look(settings) as engine:
        current = revision(engine)
    if current == HEAD:
        yield fine("revision", f"{HEAD}, as loractl {__version__} needs it")
    elif settings.embedded_database and (current is None or OLDEST <= current < HEAD):
        yield warning(
            "revision",
            f"{current}; this loractl needs {HEAD}",
            "a command upgrades it once no worker serves it",
        )
    else:
        wrong = mismatch(current)
        yield broken("revision", wrong.sentence, wrong.hint)


def see_logins(settings: Settings) -> Iterator[Condition]:
    """What a lab's login could fill the database's server with."""
    if settings.embedded_database:
        yield fine("logins", "none: SQLite's file is its owner's alone")
        return
    with one_look(settings) as engine:
        if not has_roles(engine):
            yield fine("logins", "the server has no roles of a lab: anyone with its address may do everything")
            return
        with engine.connect() as connection:
            found = unbounded(connection)
    if not found:
        yield fine("logins", "their rows and temporary files are bounded")
        return
    what = f"a login that submits may fill the database's server with {' and '.join(found)}"
    yield warning("logins", what, "as a superuser of the server: loractl db roles")


def see_clock(settings: Settings) -> Iterator[Condition]:
    """How far this machine's clock is off the database's, which all times in the tables follow."""
    with one_look(settings) as engine:
        store = Store(engine)
        store.now()  # connects
        before = dt.datetime.now(dt.UTC)
        theirs = store.now()
        ours = before + (dt.datetime.now(dt.UTC) - before) / 2
    off = (ours - theirs).total_seconds()
    if abs(off) < CLOCK_WARNING_S:
        yield fine("clock", f"{abs(off):.1f} s from the database's")
        return
    what = f"this machine's clock is {duration(abs(off))} {'ahead of' if off > 0 else 'behind'} the database's"
    hint = "let both follow one time server: timedatectl set-ntp true"
    yield (broken if abs(off) >= CLOCK_ERROR_S else warning)("clock", what, hint)


def see_queue(settings: Settings) -> Iterator[Condition]:
    """Whether it answers. The embedded one is not started."""
    from loractl.common.queue.hints import open_sender
    from loractl.common.queue.valkey import embedded_runs, server_binary

    if settings.redis_url is None and not embedded_runs(settings):
        yield fine("queue", f"the embedded Valkey does not run; a worker starts {server_binary()}")
        return
    began = time.monotonic()
    with open_sender(settings) as sender:
        sender.wake(())
    name = "the embedded Valkey" if settings.redis_url is None else redacted(settings.redis_url)
    yield fine("queue", f"answers in {_ms(began)}: {name}")


def see_store(settings: Settings) -> Iterator[Condition]:
    """Whether it is the lab's, and a data set, stored as a client does, and a checkpoint, stored as a box does, read
    back as written."""
    mark, address = _mark(settings), redacted(settings.artifacts_url)
    if not mark and is_home_s(settings) and not folder_of(settings).exists():
        yield skipped("store", f"there is none yet: {address}", "loractl submit job.yaml makes it")
        return
    store, began = open_store(settings, mark=mark or ""), time.monotonic()
    refused: dict[str, ArtifactError] = {}
    with tempfile.TemporaryDirectory(prefix="loractl-doctor-") as folder:
        for what, keep in (("data sets", _keep_dataset), ("results", _keep_checkpoint)):
            try:
                keep(store, Path(folder))
            except ArtifactError as error:
                refused[what] = error
    if not refused:
        yield fine("store", f"writes and reads back in {_ms(began)}: {address}")
    elif len(refused) == 1:
        missing = next(iter(refused))
        whose = "a client's, and not a GPU box's" if missing == "results" else "a GPU box's, and not a client's"
        yield fine("store", f"takes no {missing} from here, so this key is {whose}: {address}")
    else:
        first = refused["data sets"]
        yield broken("store", first.sentence, first.hint)
    if mark == "" and not settings.embedded_database:
        what = "the database does not know the lab's store yet, so a worker with another one would take jobs"
        yield warning("store", what, "as the owner of the tables: loractl lab adopt-store")


def _mark(settings: Settings) -> str | None:
    """The mark by which the database knows the store, "" if it knows none; None: the database can't be asked."""
    if not has_database(settings):
        return None
    try:
        with one_look(settings) as engine:
            if revision(engine) != HEAD:
                return None
            store = Store(engine)
            return store.lab.setting(SETTING) or "" if settings.embedded_database else known_mark(settings, store)
    except WrongStore:
        raise
    except LoractlError:  # its own check says so
        return None


def _keep_dataset(store: ArtifactStore, folder: Path) -> None:
    file = folder / "doctor.jsonl"
    file.write_text(f'{{"text": "loractl doctor {secrets.token_hex(8)}"}}\n')
    uri, sha256 = store.put_dataset(file)
    store.fetch_dataset(uri, sha256, folder / "back")
    with contextlib.suppress(ArtifactError):  # a client's key may not remove it: loractl gc does
        store.remove(uri.removeprefix(f"{store.url}/"))


def _keep_checkpoint(store: ArtifactStore, folder: Path) -> None:
    (folder / "result").mkdir()
    (folder / "result" / "doctor").write_text(secrets.token_hex(8))
    prefix = checkpoint_prefix(NO_JOB, 1, 1 + secrets.randbelow(10**9))
    store.put_result(folder / "result", prefix)  # reads all of it back
    store.remove_checkpoint(prefix)
    store.remove_checkpoints(NO_JOB, 1)  # and the folders, which are empty now


def see_boxes(settings: Settings) -> Iterator[Condition]:
    """Each box: its versions, whether it is online, and whether its cards take jobs."""
    from loractl.scheduler.fleet.answer import STOPPED, fleet

    with one_look(settings) as engine:
        found = fleet(Store(engine))
    devices = found.devices
    if found.stopped_s is not None:
        what = f"no worker has run the fleet's round for {duration(found.stopped_s)}: lost ones are not noticed"
        yield broken("boxes", what, STOPPED)
    boxes: dict[str, list[DeviceState]] = defaultdict(list)
    for device in devices:
        boxes[device.row.host].append(device)
    if not boxes:
        yield warning("boxes", "no worker is online", "start one on a GPU box: loractl worker")
    for host, cards in boxes.items():
        yield _box(host, cards)
    yield from _different_libraries(devices)


def _box(host: str, cards: list[DeviceState]) -> Condition:
    theirs = cards[0].row.versions.get("loractl", "?")
    what = f"{host}: loractl {theirs}, {len(cards)} card{'s' * (len(cards) != 1)}"
    if theirs != __version__:
        hint = "run one version everywhere: docs/deploy.md#upgrading-loractl"
        return warning("boxes", f"{what}; this is loractl {__version__}", hint)
    if silent := [card.silent_s for card in cards if card.silent_s is not None]:
        hint = f"on {host}: systemctl status loractl-worker, or loractl worker"
        return warning("boxes", f"{what}; {len(silent)} not seen for {duration(max(silent))}", hint)
    if faults := [f"{card.row.node} is closed: {card.row.fault}" for card in cards if card.row.fault is not None]:
        return warning("boxes", f"{what}; {faults[0]}", "docs/deploy.md#cards-that-fail; loractl gpus lists all")
    return fine("boxes", what)


def _different_libraries(devices: tuple[DeviceState, ...]) -> Iterator[Condition]:
    """Whatever decides a training's arithmetic should be the same on all boxes: a job may continue on another box."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for device in devices:
        for package, version in device.row.versions.items():
            found[package].setdefault(version, device.row.host)
    for package, hosts in found.items():
        if len(hosts) > 1 and package != "loractl":
            where = ", ".join(f"{version} on {host}" for version, host in hosts.items())
            hint = "a job that continues on another box then computes differently: install the same versions"
            yield warning("boxes", f"{package} is {where}", hint)


def _ms(began: float) -> str:
    return f"{1000 * (time.monotonic() - began):.0f} ms"
