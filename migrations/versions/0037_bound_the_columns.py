"""Where values go that their columns may not hold (revision 0037).

The bounds themselves are the column types'. They are brought to the tables after all migrations (`checks.hold`).
"""

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "quarantine",
        sa.Column("quarantine_id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("table_name", sa.String(64), nullable=False),
        sa.Column("row_key", sa.Text(), nullable=False),
        sa.Column("column_name", sa.String(64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    release(op.get_bind())
    op.drop_table("quarantine")
