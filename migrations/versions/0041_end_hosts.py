"""An attempt is one process: trainers that kept a base and took several jobs are gone (revision 0041).

What was measured of such a trainer is nobody's peak, and taught the plan nothing. It goes, and so that no reservation
in it teaches anything either, its attempts count as those of an engine that no plan is for.
"""

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0041"
down_revision = "0040"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_NO_ENGINE = 0
_COLUMNS = ("host", "inside", "promised_at", "joined", "shared")
_INDEXES = {
    "ix_attempts_host": ("attempts", ["host"], sa.text("host IS NOT NULL")),
    "ix_attempts_inside": ("attempts", ["host"], sa.text("host IS NOT NULL AND (ended_at IS NULL OR inside)")),
    "ix_jobs_base": ("jobs", ["status", "base_model", "priority", "job_id"], sa.text("status = 'queued'")),
}


def upgrade() -> None:
    measured = ("vram_peak", "vram_allocated", "vram_process")
    attempts = sa.table("attempts", *map(sa.column, (*measured, "engine", "shared")))
    op.execute(attempts.update().where(attempts.c.shared).values({**dict.fromkeys(measured), "engine": _NO_ENGINE}))
    for name, (table, _, _) in _INDEXES.items():
        op.drop_index(name, table_name=table)
    if op.get_bind().dialect.name == "sqlite":
        release(op.get_bind(), ["attempts"])  # a column that a check names can't be dropped
    for name in _COLUMNS:
        op.drop_column("attempts", name)
    op.drop_table("hosts")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION IF EXISTS loractl_fits_hosts_law")


def downgrade() -> None:
    for column in (
        sa.Column("host", sa.String(32), nullable=True),
        sa.Column("inside", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("promised_at", _TIME, nullable=True),
        sa.Column("joined", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("shared", sa.Boolean(), nullable=False, server_default=sa.false()),
    ):
        op.add_column("attempts", column)
    for name, (table, columns, condition) in _INDEXES.items():
        op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)
    op.create_table(
        "hosts",
        sa.Column("host", sa.String(32), primary_key=True),
        sa.Column("node", sa.String(255), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("method", sa.String(8), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("leaving", sa.Boolean(), nullable=False),
        sa.Column("since", _TIME, nullable=False),
        sa.Column("open", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("law", sa.JSON(), nullable=True),
        sa.Column("spoilt", sa.Text(), nullable=True),
    )
    op.create_index("ix_hosts_node", "hosts", ["node"])
