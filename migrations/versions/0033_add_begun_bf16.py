"""Whether a job's stored checkpoint was trained in bfloat16 (revision 0033): it waits for a card of that format."""

import sqlalchemy as sa
from alembic import op

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("begun_bf16", sa.Boolean(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "begun_bf16")
