"""Columns that nobody reads go, and a wish to cancel a running job is one row on SQLite, too (revision 0042)."""

import importlib
from typing import Any

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0042"
down_revision = "0041"
branch_labels = None
depends_on = None

_COLUMNS: dict[str, dict[str, sa.types.TypeEngine[Any]]] = {
    "jobs": {"spec_hash": sa.String(64), "cancel_requested": sa.Boolean()},
    "nodes": {"reserved": sa.BigInteger()},
}
_WISHES = """
INSERT INTO wishes (job_id, "user", at) SELECT job_id, 'somebody', CURRENT_TIMESTAMP FROM jobs
  WHERE status = 'running' AND cancel_requested AND job_id NOT IN (SELECT job_id FROM wishes)
"""
_GONE = "  job.cancel_requested := coalesce(job.cancel_requested, false);\n"


def upgrade() -> None:
    op.execute(_WISHES)
    if op.get_bind().dialect.name == "sqlite":
        release(op.get_bind(), list(_COLUMNS))  # a column that a check names can't be dropped
    for table, columns in _COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
    _make_submit(_submit().replace(_GONE, ""))


def downgrade() -> None:
    for table, columns in _COLUMNS.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind, nullable=True))
    _make_submit(_submit())


def _submit() -> str:
    return str(importlib.import_module("loractl.migrations.versions.0036_number_by_function")._SUBMIT)


def _make_submit(statement: str) -> None:
    if op.get_bind().dialect.name == "postgresql":
        made = statement.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
        op.get_bind().exec_driver_sql(made.replace("%", "%%"))
