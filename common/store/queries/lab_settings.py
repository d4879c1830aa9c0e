"""Settings of the lab as a whole. On PostgreSQL only the owner of the tables writes them."""

from __future__ import annotations

from sqlalchemy import select

from ..tables import Adapter, Job, LabSetting
from ..transaction import Transaction


def read_setting(tx: Transaction, name: str) -> str | None:
    """None: nobody has set it."""
    setting = tx.session.get(LabSetting, name)
    return None if setting is None else setting.value


def write_setting(tx: Transaction, name: str, value: str, by: str) -> None:
    """Set it, in place of what was. Raises Forbidden for a login that is not the owner's."""
    tx.put(LabSetting, "name", {"name": name, "value": value, "set_by": by, "at": tx.now()})


def read_named_store(tx: Transaction) -> str | None:
    """The address of the artifact store that the newest result, or one of the newest jobs, names; None: none does."""
    uri = tx.session.scalar(select(Adapter.uri).order_by(Adapter.job_id.desc()).limit(1))
    if uri is not None:
        return uri.rpartition("/jobs/")[0]
    for data in tx.session.scalars(select(Job.data).order_by(Job.job_id.desc()).limit(_NEWEST)):
        for stored in data.values():
            if isinstance(stored, dict):
                return str(stored.get("uri")).rpartition("/datasets/")[0]
    return None


_NEWEST = 50
"""Jobs that are asked for a store; data sets of the hub name none."""
