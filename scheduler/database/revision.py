"""An upgrade of the tables to this loractl's form, while nobody uses them, with a backup if wanted; and the roles of a
lab's database."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loractl.common.errors import Forbidden, UsageError
from loractl.common.lab_store import adopt_if_sure
from loractl.common.settings import Settings
from loractl.common.store.checks import quarantined
from loractl.common.store.database import connect, one_look, reachable
from loractl.common.store.roles import SHOW, SUBMIT, WORK, RolesDone, WantedLogin, apply_roles, has_roles
from loractl.common.store.schema import HEAD, OLDEST, require_unserved, revision, upgrade
from loractl.common.store.store import Store

from .backup import Contents, back_up

YIELDING = "0048"
"""From this revision on jobs yield to much shorter ones unless they say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Upgraded:
    """The outcome of an upgrade."""

    before: str | None  # None: there were no tables
    after: str
    saved: Contents | None  # what the backup holds; None: none was wanted, or there was nothing to do
    quarantined: int  # values that broke their columns' bounds, by this upgrade or earlier ones
    never_yielding: int  # waiting and running jobs of before, which keep their cards
    roles_wanted: bool  # the roles still need rights to what is new, which this login may not grant


def bring_to_head(settings: Settings, backup: Path | None, *, force: bool) -> Upgraded:
    """Upgrade the tables. Raises WrongState, without `force`, while workers of the older form serve; SchemaMismatch for
    a database newer than this loractl; what back_up raises."""
    with reachable(settings):
        engine = connect(settings, check_schema=False)
        try:
            found, saved = revision(engine), None
            if found is not None and OLDEST <= found < HEAD:
                if not force:
                    require_unserved(engine, found)
                saved = None if backup is None else back_up(settings, backup)
            before, after = upgrade(engine)
            wanted = before != after and has_roles(engine)
            if wanted:
                with contextlib.suppress(Forbidden):  # then somebody with the right must do it
                    apply_roles(engine)
                    wanted = False
            return Upgraded(
                before=before,
                after=after,
                saved=saved,
                quarantined=quarantined(engine),
                never_yielding=0 if before is None or before >= YIELDING else Store(engine).jobs.never_yielding(),
                roles_wanted=wanted,
            )
        finally:
            engine.dispose()


def store_unknown(settings: Settings) -> str | None:
    """Let the database know the lab's artifact store, as its owner. Why it still knows none; None: it does."""
    with one_look(settings) as engine:
        why = adopt_if_sure(settings, Store(engine))
    return None if why is None else why.sentence


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
