"""The parts of a spec that are read before a claim, queue keys and what a card showed have a shape (revision 0045).

The bounds come from the columns' types, at the end of an upgrade. A job that ended before there were keys gets one.
"""

from alembic import op

revision = "0045"
down_revision = "0044"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("UPDATE jobs SET queue_key = '10000|000||' WHERE queue_key = ''")


def downgrade() -> None:
    pass
