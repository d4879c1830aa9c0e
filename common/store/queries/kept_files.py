"""The files in a box's cache that its jobs have left for later ones."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, delete, select

from ..records import Claim
from ..tables import Attempt, KeptFile
from ..transaction import NewRow, Transaction

MOST = 128
"""Files of a box: every order lists them. A sweep leaves one to three."""


def kept_files(host: str) -> Select[KeptFile]:
    """What a box keeps of jobs that run no more, the newest first."""
    return select(KeptFile).where(KeptFile.host == host).order_by(KeptFile.at.desc(), KeptFile.key).limit(MOST)


def _of_this_box(new: NewRow) -> ColumnElement[bool]:
    return KeptFile.host == new["host"]


def keep(tx: Transaction, claim: Claim, kept: Sequence[tuple[str, str]]) -> None:
    """Write down what an attempt has left, in place of what had the same key. The box's oldest make room for it.

    The caller has checked the token in this transaction.
    """
    mine = select(Attempt.node).where(Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt)
    host = tx.session.scalars(mine).one().rpartition(":")[0]
    for key, sha256 in sorted(kept):  # in one order: two attempts may leave the same
        row = {"key": key, "host": host, "sha256": sha256, "job_id": claim.job_id, "at": tx.now()}
        tx.put(KeptFile, "key", row, _of_this_box)
    beyond = kept_files(host).with_only_columns(KeptFile.key).limit(None).offset(MOST)
    tx.session.execute(
        delete(KeptFile).where(KeptFile.key.in_(beyond.with_for_update(skip_locked=True))),
        execution_options={"synchronize_session": False},
    )
