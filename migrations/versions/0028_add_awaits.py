"""The job that a waiting one starts after (revision 0028). Such a job is held, so that workers of an earlier version
leave it alone; one of this version lets it go."""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

_BLOCKED = sa.text("status = 'queued' AND awaits IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("awaits", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("held_too", sa.Boolean(), nullable=False, server_default=sa.false()))
    columns = ["status", "awaits", "job_id"]
    op.create_index("ix_jobs_awaits", "jobs", columns, postgresql_where=_BLOCKED, sqlite_where=_BLOCKED)


def downgrade() -> None:
    op.drop_index("ix_jobs_awaits", "jobs")
    op.drop_column("jobs", "held_too")
    op.drop_column("jobs", "awaits")
