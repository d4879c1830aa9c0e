"""An index for the jobs of a name, which people look for (revision 0012)."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_name", "jobs", ["name", "job_id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_name", table_name="jobs")
