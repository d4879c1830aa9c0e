"""Indexes for what people list: waiting jobs in order, what ended today, a sweep's members, the newest adapter of a
name (revision 0009)."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_WAITING = sa.text("status = 'queued'")
_ENDED = sa.text("ended_at IS NOT NULL")


def upgrade() -> None:
    op.create_index(
        "ix_jobs_order", "jobs", ["status", "priority", "job_id"], postgresql_where=_WAITING, sqlite_where=_WAITING
    )
    op.create_index("ix_jobs_ended", "jobs", ["ended_at", "status"], postgresql_where=_ENDED, sqlite_where=_ENDED)
    op.create_index("ix_jobs_sweep", "jobs", ["sweep_id", "status", "ended_at"])
    op.drop_index("ix_jobs_sweep_id", table_name="jobs")
    op.create_index("ix_adapters_newest", "adapters", ["name", "created_at", "job_id"])
    op.drop_index("ix_adapters_name", table_name="adapters")


def downgrade() -> None:
    op.create_index("ix_adapters_name", "adapters", ["name"])
    op.drop_index("ix_adapters_newest", table_name="adapters")
    op.create_index("ix_jobs_sweep_id", "jobs", ["sweep_id"])
    for name in ("ix_jobs_sweep", "ix_jobs_ended", "ix_jobs_order"):
        op.drop_index(name, table_name="jobs")
