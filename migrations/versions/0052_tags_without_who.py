"""Who set a tag, and when, is in the histories of its jobs alone (revision 0052)."""

import importlib
from typing import Any

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release_columns

revision = "0052"
down_revision = "0051"
branch_labels = None
depends_on = None

_COLUMNS: dict[str, sa.types.TypeEngine[Any]] = {"user": sa.String(255), "at": sa.DateTime(timezone=True)}
_WITHOUT = {
    ', "user", at) SELECT named, its_tag, asked.job_id, asked.who, clock_timestamp()': (
        ") SELECT named, its_tag, asked.job_id"
    ),
    ', "user" = excluded."user", at = excluded.at': "",
}


def upgrade() -> None:
    told = _set_tag()
    for part, instead in _WITHOUT.items():
        assert part in told
        told = told.replace(part, instead)
    _make(told)
    release_columns(op.get_bind(), "tags", _COLUMNS)
    for name in _COLUMNS:
        op.drop_column("tags", name)


def downgrade() -> None:
    for name, kind in _COLUMNS.items():
        op.add_column("tags", sa.Column(name, kind, nullable=True))
    _make(_set_tag())


def _set_tag() -> str:
    return str(importlib.import_module("loractl.migrations.versions.0035_change_at_commit")._SET_TAG)


def _make(statement: str) -> None:
    if op.get_bind().dialect.name == "postgresql":
        made = statement.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
        op.get_bind().exec_driver_sql(made.replace("%", "%%"))
