"""A box's owner may let no job there yield to a shorter one (revision 0049)."""

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0049"
down_revision = "0048"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("keeps_jobs", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        release(op.get_bind(), ["nodes"])  # a column that a check names can't be dropped
    op.drop_column("nodes", "keeps_jobs")
