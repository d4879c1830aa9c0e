"""Settings of the lab as a whole. On PostgreSQL only the owner of the tables writes them."""

from __future__ import annotations

from ..tables import LabSetting
from ..transaction import Transaction


def read_setting(tx: Transaction, name: str) -> str | None:
    """None: nobody has set it."""
    setting = tx.session.get(LabSetting, name)
    return None if setting is None else setting.value


def write_setting(tx: Transaction, name: str, value: str, by: str) -> None:
    """Set it, in place of what was. Raises Forbidden for a login that is not the owner's."""
    tx.put(LabSetting, "name", {"name": name, "value": value, "set_by": by, "at": tx.now()})


def write_first(tx: Transaction, name: str, value: str, by: str) -> str:
    """Set it unless it is set; returns what counts then. Raises as `write_setting` does."""
    tx.add_new(LabSetting, [{"name": name, "value": value, "set_by": by, "at": tx.now()}])
    return read_setting(tx, name) or value
