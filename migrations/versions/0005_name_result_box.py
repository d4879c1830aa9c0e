"""The box that holds a finished result which could not be stored, and until when it alone takes the job (0005)."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("result_host", sa.String(255), nullable=True))
    op.add_column("jobs", sa.Column("result_until", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("result_until")
        batch.drop_column("result_host")
