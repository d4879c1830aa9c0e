"""Several cards for one job: what each has of it, how it may be divided, and which nodes can (revision 0022)."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("gangs", sa.JSON(), nullable=True))
    op.add_column("nodes", sa.Column("gangs", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "shares",
        sa.Column("job_id", sa.Integer(), sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("node", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "attempt", "rank"),
    )
    op.create_index("ix_shares_node", "shares", ["node"])


def downgrade() -> None:
    op.drop_table("shares")
    with op.batch_alter_table("nodes") as batch:
        batch.drop_column("gangs")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("gangs")
