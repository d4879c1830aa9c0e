"""An upgrade of the tables to this loractl's form, while nobody uses them, with a backup if wanted."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from loractl.common.errors import Forbidden
from loractl.common.lab_store import adopt_if_sure
from loractl.common.settings import Settings
from loractl.common.store.checks import quarantined
from loractl.common.store.database import connect, one_look, reachable
from loractl.common.store.roles import apply_roles, has_roles
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
    quarantined: int  # values that broke their columns' bounds, by this upgrade and earlier ones
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
