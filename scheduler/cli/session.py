"""What every command opens first: the settings and the jobs' store. A command's help loads neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loractl.common.errors import SchemaMismatch, ServiceUnreachable

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore
    from loractl.common.settings import Settings
    from loractl.common.store.store import Store


def open_session() -> tuple[Settings, Store]:
    """The settings, and a store with a database that has just answered. Raises ServiceUnreachable, SchemaMismatch."""
    from loractl.common.settings import load_settings
    from loractl.common.store.database import connect, reachable
    from loractl.common.store.store import Store

    settings = load_settings()
    with reachable(settings):
        return settings, Store(connect(settings))


def open_to_check(settings: Settings) -> tuple[Store | None, str | None]:
    """A read-only store for a dry run: no database is created, upgraded or needed. With it, what can't be checked.

    Raises LoractlError for a database that refuses this user.
    """
    from loractl.common.store.database import connect_to_read, has_database, reachable
    from loractl.common.store.store import Store

    if not has_database(settings):
        return None, None  # nothing has been measured, and there is no adapter to start from
    try:
        with reachable(settings):
            return Store(connect_to_read(settings)), None
    except (ServiceUnreachable, SchemaMismatch) as error:
        return None, f"Not checked: what the database knows, like lora.init_from: {error.sentence}."


def open_stores() -> tuple[Settings, Store, ArtifactStore]:
    """What open_session opens, and the artifact store. Raises UsageError too."""
    settings, store = open_session()
    return settings, store, open_artifacts(settings, store)


def open_artifacts(settings: Settings, store: Store | None) -> ArtifactStore:
    """The artifact store, which warns of results that are not bound to their rows, and refuses to be another than the
    lab's. `store`: None for a dry run, which writes nothing there. Raises UsageError, WrongStore."""
    from loractl.common.artifacts import open_store
    from loractl.common.lab_store import open_lab_store

    return open_store(settings, _warn) if store is None else open_lab_store(settings, store, _warn)


def _warn(sentence: str) -> None:
    click.echo(f"Warning: {sentence}.", err=True)
