"""Attempts name the engine whose steps they took: peaks of an older one say nothing about a newer (revision 0013)."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("engine", sa.Integer(), nullable=False, server_default="1"))


def downgrade() -> None:
    with op.batch_alter_table("attempts") as batch:
        batch.drop_column("engine")
