"""Indexes without which each query is as fast go (revision 0044).

The one on leases was written by each heartbeat: PostgreSQL could not update the row in its page.
"""

import sqlalchemy as sa
from alembic import op

revision = "0044"
down_revision = "0043"
branch_labels = None
depends_on = None

_Indexes = dict[str, tuple[str, list[str], str | None]]
_WAITS = "status = 'queued'"
_GONE: _Indexes = {
    "ix_jobs_held": ("jobs", ["status", "job_id"], f"{_WAITS} AND held"),
    "ix_jobs_backoff": ("jobs", ["status", "not_before"], f"{_WAITS} AND not_before IS NOT NULL"),
    "ix_jobs_lease": ("jobs", ["lease_expires_at"], "status = 'running'"),
    "ix_jobs_outcome": ("jobs", ["status", "reason"], "ended_at IS NOT NULL"),
    "ix_jobs_ended": ("jobs", ["ended_at", "status", "sweep_id", "job_id"], "ended_at IS NOT NULL"),
    "ix_shares_node": ("shares", ["node"], None),
    "ix_looks_rows": ("looks", ["rows_sha256", "look_id"], None),
    "ix_kept_files_job_id": ("kept_files", ["job_id"], None),
}
_NEW: _Indexes = {
    "ix_jobs_paused": ("jobs", ["status", "held", "not_before"], f"{_WAITS} AND (held OR not_before IS NOT NULL)"),
    "ix_jobs_ended": ("jobs", ["ended_at", "status", "reason", "sweep_id", "job_id"], "ended_at IS NOT NULL"),
}


def upgrade() -> None:
    _replace(_GONE, _NEW)


def downgrade() -> None:
    _replace(_NEW, _GONE)


def _replace(gone: _Indexes, new: _Indexes) -> None:
    for name, (table, _, _) in gone.items():
        op.drop_index(name, table_name=table)
    for name, (table, columns, where) in new.items():
        condition = None if where is None else sa.text(where)
        op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)
