"""The files in the caches of boxes that later jobs may use, with their hashes (revision 0040)."""

import sqlalchemy as sa
from alembic import op

revision = "0040"
down_revision = "0039"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "kept_files",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("job_id", _NUMBER, sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_kept_files_host", "kept_files", ["host", "at"])
    op.create_index("ix_kept_files_job_id", "kept_files", ["job_id"])


def downgrade() -> None:
    op.drop_table("kept_files")
