"""Cards that close themselves: why nothing can run on one, and what its self-test showed (revision 0008)."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("fault", sa.Text(), nullable=True))
    op.add_column("nodes", sa.Column("self_test", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("nodes") as batch:
        batch.drop_column("self_test")
        batch.drop_column("fault")
