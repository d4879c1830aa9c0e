"""What a job is to compute, how long that is predicted to take, and where attempts' time went (revision 0043)."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0043"
down_revision = "0042"
branch_labels = None
depends_on = None


def _columns() -> list[tuple[str, sa.Column[Any]]]:
    return [
        ("jobs", sa.Column("extent", sa.JSON(), nullable=True)),
        ("jobs", sa.Column("forecasts", sa.JSON(), nullable=True)),
        ("jobs", sa.Column("work_left_s", sa.Double(), nullable=False, server_default="3600")),
        ("attempts", sa.Column("seconds_predicted", sa.Double(), nullable=True)),
        ("attempts", sa.Column("predicted_by", sa.String(24), nullable=True)),
        ("attempts", sa.Column("prepared_s", sa.Double(), nullable=True)),
        ("attempts", sa.Column("trained_s", sa.Double(), nullable=True)),
        ("attempts", sa.Column("trained_steps", sa.Integer(), nullable=True)),
    ]


_HELD = "  job.held_too := coalesce(job.held_too, false);\n"
_LEFT = "  job.work_left_s := coalesce(job.work_left_s, 3600); -- an earlier client's job\n"


def upgrade() -> None:
    for table, column in _columns():
        op.add_column(table, column)
    _replace_in_submit(_HELD, _HELD + _LEFT)


def _replace_in_submit(before: str, after: str) -> None:
    """PostgreSQL's function writes a row of what it is given, without the columns' defaults."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        function = connection.scalar(sa.text("SELECT pg_get_functiondef('loractl_submit(json)'::regprocedure)"))
        assert isinstance(function, str) and before in function
        op.execute(function.replace(before, after))


def downgrade() -> None:
    _replace_in_submit(_HELD + _LEFT, _HELD)
    release(op.get_bind(), ["jobs", "attempts"])  # a column that a check names can't be dropped
    for table, column in _columns():
        op.drop_column(table, column.name)
