"""Nodes name their machine and its boot, so that a copy of a home is no live box's successor (revision 0010)."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("machine", sa.String(64), nullable=True))
    op.add_column("nodes", sa.Column("boot", sa.String(64), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("nodes") as batch:
        batch.drop_column("boot")
        batch.drop_column("machine")
