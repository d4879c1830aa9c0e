"""What every command opens first: the settings and the jobs' store."""

from __future__ import annotations

from loractl.common.settings import Settings, load_settings
from loractl.common.store.database import connect, reachable
from loractl.common.store.store import Store


def open_session() -> tuple[Settings, Store]:
    """Settings and a store whose database answered just now. Raises ServiceUnreachable, SchemaMismatch."""
    settings = load_settings()
    with reachable(settings):
        return settings, Store(connect(settings))
