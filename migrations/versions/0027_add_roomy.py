"""What jobs may have beyond their need, and which attempts had it (revision 0027). Workers of an earlier version give
nobody the room, and leave it open what their attempts had."""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("roomy", sa.JSON(), nullable=True))
    op.add_column("attempts", sa.Column("roomy", sa.Boolean(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("attempts") as batch:
        batch.drop_column("roomy")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("roomy")
