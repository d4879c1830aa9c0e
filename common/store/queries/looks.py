"""Looks at what jobs measured on their final rows: one row each, which nobody changes."""

from __future__ import annotations

from sqlalchemy import Select, select

from ..tables import FinalLook
from ..transaction import Transaction
from .jobs import read_job


def look(tx: Transaction, job_id: int, rows_sha256: str, user: str) -> list[FinalLook]:
    """Raises JobNotFound."""
    sweep_id = read_job(tx, job_id).sweep_id
    mine = FinalLook(job_id=job_id, sweep_id=sweep_id, rows_sha256=rows_sha256, user=user, at=tx.now())
    tx.session.add(mine)
    tx.session.flush()
    so_far = looks(rows_sha256).where(FinalLook.look_id <= mine.look_id)
    # who looked and when is the login's word and the server's time, where it has roles
    return list(tx.session.scalars(so_far, execution_options={"populate_existing": True}))


def looks(rows_sha256: str) -> Select[FinalLook]:
    """All at these rows, in their order."""
    return select(FinalLook).where(FinalLook.rows_sha256 == rows_sha256).order_by(FinalLook.look_id)
