"""How far a running job's evaluation is (revision 0020)."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("evaluated", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("to_evaluate", sa.Integer(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("to_evaluate")
        batch.drop_column("evaluated")
