"""What nodes, the page and a submit ask again and again, each by an index (revision 0025).

The index of waiting jobs by number goes: that on status has had the number since revision 0015.
"""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

_Indexes = dict[str, tuple[str | None, str, list[str]]]  # by name: the condition, the table, the columns

_ENDED = "ended_at IS NOT NULL"
_NEW: _Indexes = {
    "ix_jobs_plan": ("status = 'queued'", "jobs", ["status", "base_model", "engine", "job_id"]),
    "ix_jobs_held": ("status = 'queued' AND held", "jobs", ["status", "job_id"]),
    "ix_jobs_backoff": ("status = 'queued' AND not_before IS NOT NULL", "jobs", ["status", "not_before"]),
    "ix_jobs_gangs": ("status = 'queued' AND gangs IS NOT NULL", "jobs", ["status", "job_id"]),
    "ix_jobs_need_key": ("attempt > 0", "jobs", ["need_key", "job_id"]),
    "ix_jobs_family": (_ENDED, "jobs", ["family", "job_id"]),
    "ix_jobs_ended": (_ENDED, "jobs", ["ended_at", "status", "sweep_id", "job_id"]),
    "ix_attempts_host": ("host IS NOT NULL", "attempts", ["host"]),
    "ix_attempts_inside": ("host IS NOT NULL AND (ended_at IS NULL OR inside)", "attempts", ["host"]),
}
_BEFORE: _Indexes = {
    "ix_jobs_waiting": ("status = 'queued'", "jobs", ["status", "job_id"]),
    "ix_jobs_need_key": (None, "jobs", ["need_key"]),
    "ix_jobs_ended": (_ENDED, "jobs", ["ended_at", "status"]),
    "ix_attempts_host": (None, "attempts", ["host"]),
}


def upgrade() -> None:
    _replace(_BEFORE, _NEW)


def downgrade() -> None:
    _replace(_NEW, _BEFORE)


def _replace(old: _Indexes, new: _Indexes) -> None:
    for name, (_, table, _) in old.items():
        op.drop_index(name, table_name=table)
    for name, (condition, table, columns) in new.items():
        where = None if condition is None else sa.text(condition)
        op.create_index(name, table, columns, postgresql_where=where, sqlite_where=where)
