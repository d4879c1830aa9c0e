"""PostgreSQL's indexes of waiting jobs begin with the column that is looked for (revision 0050).

Before, they began with the status, which is always the same there. PostgreSQL leaves out of a search what an index's
condition implies, and before its version 18 went through such an index from its start: a claim looked at all waiting
jobs once for each line.
"""

import sqlalchemy as sa
from alembic import op

revision = "0050"
down_revision = "0049"
branch_labels = None
depends_on = None

_FREE = " AND NOT held AND awaits IS NULL"
_INDEXES = {
    "line": (["user", "queue_key", "work_left_s", "job_id"], _FREE),
    "line_age": (["user", "queue_key", "job_id"], _FREE),
    "line_user": (["priority", "user", "job_id"], ""),
    "order": (["priority", "job_id"], ""),
    "class": (["vram_class"], ""),
    "plan": (["base_model", "engine", "job_id"], ""),
    "patience": (["lora_until"], " AND lora_until IS NOT NULL"),
    "paused": (["held", "not_before"], " AND (held OR not_before IS NOT NULL)"),
    "awaits": (["awaits", "job_id"], " AND awaits IS NOT NULL"),
    "gangs": (["job_id"], " AND gangs IS NOT NULL"),
}


def upgrade() -> None:
    _create([])


def downgrade() -> None:
    _create(["status"])


def _create(first: list[str]) -> None:
    if op.get_bind().dialect.name == "sqlite":  # it needs the status in front
        return
    for name, (columns, also) in _INDEXES.items():
        op.drop_index(f"ix_jobs_{name}", table_name="jobs")
        condition = sa.text(f"status = 'queued'{also}")
        op.create_index(f"ix_jobs_{name}", "jobs", [*first, *columns], postgresql_where=condition)
