"""The lab's artifact store: the one whose mark the lab's database knows, wherever it is mounted."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from .artifacts import ArtifactStore, attempt_prefix, open_store
from .errors import ArtifactError, LoractlError, ServiceUnreachable, WrongState, WrongStore
from .settings import Settings, make_private, redacted
from .store.records import Page

if TYPE_CHECKING:
    from .store.store import Store

SETTING = "store"
"""The lab's setting that holds the mark."""


def open_lab_store(settings: Settings, store: Store, tell: Callable[[str], None] | None = None) -> ArtifactStore:
    """The artifact store, which refuses to be another than the lab's. Raises what known_mark raises."""
    return open_store(settings, tell, mark=known_mark(settings, store))


def open_to_read(settings: Settings, store: Store) -> ArtifactStore:
    """For a database that takes no writes: no store becomes known."""
    return open_store(settings, mark=store.lab.setting(SETTING) or "")


def known_mark(settings: Settings, store: Store) -> str:
    """The mark by which the database knows the store; "" while it knows none.

    One machine's store becomes known here. Raises WrongStore for a home's own store in a lab on PostgreSQL that has
    another one, or none yet.
    """
    if (known := store.lab.setting(SETTING)) is not None:
        return known
    if not settings.embedded_database:
        if is_home_s(settings):
            raise WrongStore(redacted(settings.artifacts_url), "it is this home's own, and the lab is on PostgreSQL")
        return ""
    with contextlib.suppress(ServiceUnreachable, ArtifactError, WrongState):  # the next use of the store reports it
        return adopt(settings, store, empty=is_home_s(settings))
    return ""


def adopt(settings: Settings, store: Store, *, empty: bool = False) -> str:
    """Let the database know the store at this installation's address by its mark, which it gets if it has none.

    `empty`: also a store without the lab's results, and a folder that is not there yet. Returns the mark. Raises
    WrongStore, WrongState, Forbidden, and what the store raises.
    """
    if empty and settings.artifacts_url.startswith("file://"):
        make_folder(settings)
    elif settings.artifacts_url.startswith("file://") and not folder_of(settings).is_dir():
        raise WrongState(
            f"this machine has no folder {folder_of(settings)}", "mount it; loractl lab adopt-store --empty makes it"
        )
    artifacts = open_store(settings, mark="")
    if not empty and (lost := _lost_result(store, artifacts)) is not None:
        raise WrongState(
            f"{redacted(settings.artifacts_url)} lacks the result of job {lost}, which the database says is stored",
            "check LORACTL_ARTIFACTS_URL and the mount; if the results are lost: loractl lab adopt-store --empty",
        )
    with _one_at_a_time(settings):
        if (mark := artifacts.read_mark()) is None:
            mark = store.lab.setting(SETTING) or secrets.token_hex(16)  # running workers know the former
            artifacts.write_mark(mark)
        store.lab.set(SETTING, mark)
    return mark


def adopt_if_sure(settings: Settings, store: Store) -> LoractlError | None:
    """For the owner of the tables: adopt the store if the database knows none and its rows name no other. Returns why
    the lab still has none."""
    if store.lab.setting(SETTING) is not None:
        return None
    named, address = store.lab.named_store(), redacted(settings.artifacts_url)
    if named is None and is_home_s(settings) and not settings.embedded_database:
        return WrongStore(address, "it is this home's own, and the lab is on PostgreSQL")
    if named not in (None, settings.artifacts_url.rstrip("/")) and not settings.embedded_database:
        return WrongStore(address, f"its jobs name {redacted(named or '')}")
    try:
        adopt(settings, store, empty=settings.embedded_database and is_home_s(settings))
    except (ServiceUnreachable, ArtifactError, WrongState) as error:
        return error
    return None


def is_home_s(settings: Settings) -> bool:
    """Whether the store is a folder in this home, as it is without LORACTL_ARTIFACTS_URL: no other box has it."""
    return settings.artifacts_url.startswith("file://") and folder_of(settings).is_relative_to(settings.home)


def make_folder(settings: Settings) -> None:
    """Make the folder of a store that is one. Nothing else does: a share that is not mounted must not look like an
    empty store. Raises LoractlError."""
    folder = folder_of(settings)
    try:
        if is_home_s(settings):
            make_private(folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoractlError(f"{folder} can't be made: {error.strerror}", "LORACTL_ARTIFACTS_URL names it") from error


def folder_of(settings: Settings) -> Path:
    """Of a store that is a folder."""
    return Path(unquote(settings.artifacts_url.removeprefix("file://")))


def _lost_result(store: Store, artifacts: ArtifactStore) -> int | None:
    """The newest job with a result, if the store lacks that."""
    lost = (
        row.job_id
        for row in store.adapters.newest(Page(limit=1))[:1]
        if not artifacts.has_result(attempt_prefix(row.job_id, row.attempt))
    )
    return next(lost, None)


@contextlib.contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Two commands that are one machine's first must not write two marks."""
    make_private(settings.runtime_dir)
    with (settings.runtime_dir / "store.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
