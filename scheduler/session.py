"""What every command opens first: the settings and the jobs' store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loractl.common.settings import Settings, load_settings
from loractl.common.store.database import connect, reachable
from loractl.common.store.store import Store

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore


def open_session() -> tuple[Settings, Store]:
    """The settings, and a store with a database that has just answered. Raises ServiceUnreachable, SchemaMismatch."""
    settings = load_settings()
    with reachable(settings):
        return settings, Store(connect(settings))


def open_stores() -> tuple[Settings, Store, ArtifactStore]:
    """What open_session opens, and the artifact store beside it. Raises UsageError too."""
    settings, store = open_session()
    return settings, store, open_artifacts(settings)


def open_artifacts(settings: Settings) -> ArtifactStore:
    """The artifact store, which warns of results that are not bound to their rows. Raises UsageError."""
    from loractl.common.artifacts import open_store

    return open_store(settings, _warn)


def _warn(sentence: str) -> None:
    click.echo(f"Warning: {sentence}.", err=True)
