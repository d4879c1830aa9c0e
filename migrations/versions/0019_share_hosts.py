"""Several jobs in one trainer: attempts name their host, and hosts keep the law of their passes (revision 0019)."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("host", sa.String(32), nullable=True))
    op.add_column("attempts", sa.Column("inside", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("attempts", sa.Column("promised_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_attempts_host", "attempts", ["host"])
    op.add_column("hosts", sa.Column("open", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("hosts", sa.Column("law", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("hosts") as batch:
        batch.drop_column("law")
        batch.drop_column("open")
    op.drop_index("ix_attempts_host", table_name="attempts")
    with op.batch_alter_table("attempts") as batch:
        batch.drop_column("promised_at")
        batch.drop_column("inside")
        batch.drop_column("host")
