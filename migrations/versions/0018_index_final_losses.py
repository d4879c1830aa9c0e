"""What members of a sweep are compared by, apart from all other points of their jobs (revision 0018)."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_FINAL = sa.text("(name = 'held_out_loss' OR substr(name, 1, 5) = 'rung_')")


def upgrade() -> None:
    op.create_index("ix_metrics_final", "metrics", ["job_id", "name"], postgresql_where=_FINAL, sqlite_where=_FINAL)


def downgrade() -> None:
    op.drop_index("ix_metrics_final", table_name="metrics")
