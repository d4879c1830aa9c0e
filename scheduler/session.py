"""What every command opens first: the settings and the jobs' store."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from loractl.common.artifacts import open_store

    settings, store = open_session()
    return settings, store, open_store(settings)
