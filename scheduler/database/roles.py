"""The roles of a lab's database, by person and box, with passwords that are chosen or generated."""

from __future__ import annotations

from collections.abc import Sequence

from loractl.common.errors import UsageError
from loractl.common.settings import Settings
from loractl.common.store.database import connect, reachable
from loractl.common.store.roles import SHOW, SUBMIT, WORK, RolesDone, WantedLogin, apply_roles


def wanted_logins(
    people: Sequence[str], boxes: Sequence[str], pages: Sequence[str], passwords: Sequence[str] | None
) -> list[WantedLogin]:
    """Logins with their roles; `passwords` in the same order, None to generate them. Raises UsageError."""
    asked = [(name, role) for names, role in ((people, SUBMIT), (boxes, WORK), (pages, SHOW)) for name in names]
    if passwords is not None and len(passwords) != len(asked):
        what = f"{len(passwords)} passwords for {len(asked)} logins"
        raise UsageError(what, "a line a login: persons first, then boxes, then pages")
    given: Sequence[str | None] = [None] * len(asked) if passwords is None else passwords
    return [WantedLogin(name=name, role=role, password=word) for (name, role), word in zip(asked, given, strict=True)]


def set_up_roles(settings: Settings, wanted: Sequence[WantedLogin], *, renew: bool) -> RolesDone:
    """Create roles and logins in the database of `settings`. Raises what apply_roles raises, and SchemaMismatch."""
    if settings.embedded_database:
        raise UsageError("only PostgreSQL has roles, and this home's database is SQLite", "set LORACTL_DATABASE_URL")
    engine = connect(settings)
    try:
        with reachable(settings):
            return apply_roles(engine, wanted, renew=renew)
    finally:
        engine.dispose()
