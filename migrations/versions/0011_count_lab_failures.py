"""The lab's failures, by card and by job, and what a job avoids (revision 0011)."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lab_failures",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("node", sa.String(255), nullable=False),
        sa.Column("reason", sa.String(24), nullable=False),
        sa.Column("user", sa.String(255), nullable=False),
        sa.Column("sweep_id", sa.Integer(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt"),
    )
    op.add_column("jobs", sa.Column("lab_failures", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("lab_step", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("avoids", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        for column in ("avoids", "lab_step", "lab_failures"):
            batch.drop_column(column)
    op.drop_table("lab_failures")
