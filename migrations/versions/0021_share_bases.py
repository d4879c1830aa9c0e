"""Attempts that share a base say what of it they reserve; waiting jobs are found by their base (revision 0021)."""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

_QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    op.add_column("attempts", sa.Column("base_bytes", sa.BigInteger(), nullable=True))
    op.add_column("attempts", sa.Column("joined", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("attempts", sa.Column("shared", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index(
        "ix_jobs_base",
        "jobs",
        ["status", "base_model", "priority", "job_id"],
        postgresql_where=_QUEUED,
        sqlite_where=_QUEUED,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_base", table_name="jobs")
    with op.batch_alter_table("attempts") as batch:
        batch.drop_column("shared")
        batch.drop_column("joined")
        batch.drop_column("base_bytes")
