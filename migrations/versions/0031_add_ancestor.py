"""The member of a sweep from whose adapter a job begins (revision 0031): known once the sweep has ended."""

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("ancestor", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "ancestor")
