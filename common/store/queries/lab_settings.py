"""Settings of the lab as a whole. On PostgreSQL only the owner of the tables writes them."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from loractl.common.errors import NotYours
from loractl.common.text import clean_line

from ..tables import Adapter, Job, LabSetting
from ..transaction import Transaction


def read_setting(tx: Transaction, name: str) -> str | None:
    """What the lab's owner has decided; None: nobody has set it."""
    setting = tx.session.get(LabSetting, name)
    return None if setting is None else setting.value


def write_setting(tx: Transaction, name: str, value: str) -> None:
    """Decide it, in place of what was. Raises Forbidden for a login that is not the owner's."""
    tx.put(LabSetting, "name", {"name": name, "value": value})


CHANGES, OPEN, OPERATORS = "changes", "open", "operators"
"""Who may change whose jobs: the value of the first, and the names that the last holds, between spaces."""


ORDER, BY_SHARE = "order", "share"
"""In which order jobs are tried: a lab with this value has the order of before, until the next release."""


GIVE_WAY, OFF = "give-way", "off"
"""Whether running jobs yield to much shorter ones: "on", as where nothing is set, "off", or the seconds that a job runs
before it first yields."""


ORDER_SET = select(LabSetting.value).where(LabSetting.name == ORDER).scalar_subquery()
"""The setting, to be read with the cards: a claim pays for each statement."""


def is_by_share(session: Session) -> bool:
    """Whether the lab has the order of before, see `turns_by_share`."""
    setting = session.get(LabSetting, ORDER)
    return setting is not None and setting.value == BY_SHARE


def read_operators(tx: Transaction) -> list[str]:
    """Whom the owner lets change everybody's jobs."""
    return (read_setting(tx, OPERATORS) or "").split()


def refuse_stranger(tx: Transaction, job_id: int, what: str, user: str) -> None:
    """Raises NotYours where this person may not do this to a job. On SQLite alone: PostgreSQL's functions ask by
    themselves, and know the login."""
    if tx.has_functions:
        return
    owner = tx.session.scalar(select(Job.user).where(Job.job_id == job_id))
    if user == owner or read_setting(tx, CHANGES) == OPEN or user in read_operators(tx):
        return
    only = f"only {clean_line(owner or '')}, an operator or the lab's owner may {what} it"
    raise NotYours(f"job {job_id} is {clean_line(owner or '')}'s: {only}")


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
