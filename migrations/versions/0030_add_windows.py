"""Until when a card's worker stays, and how long a job takes to its first stored checkpoint (revision 0030). Cards of
workers of an earlier version have no end, as far as the rule knows."""

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("until", sa.DateTime(timezone=True), nullable=True))
    op.add_column("nodes", sa.Column("window_s", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("checkpoint_s", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "checkpoint_s")
    op.drop_column("nodes", "window_s")
    op.drop_column("nodes", "until")
