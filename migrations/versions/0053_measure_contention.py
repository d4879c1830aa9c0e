"""How much jobs on one card slow each other is measured (revision 0053)."""

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release_columns

revision = "0053"
down_revision = "0052"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("neighbours", sa.Double(), nullable=True))
    op.create_table(
        "contentions",
        sa.Column("device_name", sa.String(255), primary_key=True),
        sa.Column("contention", sa.Double(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("contentions")
    release_columns(op.get_bind(), "attempts", ["neighbours"])
    op.drop_column("attempts", "neighbours")
