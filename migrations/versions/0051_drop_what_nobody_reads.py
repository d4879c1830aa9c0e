"""Columns that nobody reads go, and a job's retries are in its spec alone (revision 0051)."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release_columns

revision = "0051"
down_revision = "0050"
branch_labels = None
depends_on = None

_BY, _AT = {"set_by": sa.String(255)}, {"at": sa.DateTime(timezone=True)}
_COLUMNS: dict[str, dict[str, sa.types.TypeEngine[Any]]] = {
    "jobs": {"max_retries": sa.Integer()},
    "quotas": {**_BY, **_AT},
    "lab_settings": {**_BY, **_AT},
    "drains": {**_AT},
    "fleet_rounds": {"node": sa.String(255)},
    "log_chunks": {**_AT},
}
_RETRIES = {
    "sqlite": "UPDATE jobs SET max_retries = json_extract(spec, '$.max_retries')",
    "postgresql": "UPDATE jobs SET max_retries = CAST(spec ->> 'max_retries' AS integer)",
}


def upgrade() -> None:
    for table, columns in _COLUMNS.items():
        release_columns(op.get_bind(), table, columns)
        for name in columns:
            op.drop_column(table, name)


def downgrade() -> None:
    for table, columns in _COLUMNS.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind, nullable=True))
    op.execute(_RETRIES[op.get_bind().dialect.name])
