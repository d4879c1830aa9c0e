"""Looks at what jobs measured on their final rows: one row each, which nobody changes."""

from __future__ import annotations

from sqlalchemy import Select, func, select

from ..tables import (
    FinalLook,
)
from ..transaction import Transaction
from .jobs import read_job


def look(tx: Transaction, job_id: int, rows_sha256: str, user: str) -> int:
    """Write one down; returns its number. Raises JobNotFound."""
    sweep_id = read_job(tx, job_id).sweep_id
    if tx.has_functions:
        look_id: int = tx.session.scalars(select(func.loractl_look(job_id, rows_sha256, user, tx.now()))).one()
        return look_id
    mine = FinalLook(job_id=job_id, sweep_id=sweep_id, rows_sha256=rows_sha256, user=user, at=tx.now())
    tx.session.add(mine)
    tx.session.flush()
    return mine.look_id


def looks(rows_sha256: str) -> Select[FinalLook]:
    """All looks at what was measured on these final rows, in their order."""
    return select(FinalLook).where(FinalLook.rows_sha256 == rows_sha256).order_by(FinalLook.look_id)
