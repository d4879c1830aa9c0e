"""An index for the jobs of a base that have run: what they were measured to take bounds a need (revision 0039)."""

import sqlalchemy as sa
from alembic import op

revision = "0039"
down_revision = "0038"
branch_labels = None
depends_on = None

_RAN = sa.text("attempt > 0")


def upgrade() -> None:
    op.create_index("ix_jobs_ran", "jobs", ["base_model", "job_id"], sqlite_where=_RAN, postgresql_where=_RAN)


def downgrade() -> None:
    op.drop_index("ix_jobs_ran", table_name="jobs")
