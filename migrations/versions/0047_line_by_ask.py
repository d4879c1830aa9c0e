"""A line of waiting jobs is what the rule reads of a job, with its bytes (revision 0047).

Before, a key had a step of an eighth of an octave, so that jobs of one key could need different memory. All keys are
written again. Each job of several cards, and each that has run, gets a line of its own.
"""

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0047"
down_revision = "0046"
branch_labels = None
depends_on = None

_FREE = sa.text("status = 'queued' AND NOT held AND awaits IS NULL")
_QUEUED = sa.text("status = 'queued'")
_NEW = {
    "ix_jobs_line": ["status", "user", "queue_key", "work_left_s", "job_id"],
    "ix_jobs_line_age": ["status", "user", "queue_key", "job_id"],
}
_OLD = {
    "ix_jobs_line": ["status", "queue_key", "job_id"],
    "ix_jobs_line_need": ["status", "queue_key", "vram_needed"],
}
_LEAST = {
    "sqlite": "printf('%017d', coalesce(vram_needed, 0))",
    "postgresql": "lpad(coalesce(vram_needed, 0)::text, 17, '0')",
}
_LABELS = """substr(queue_key, 11, length(queue_key) - 11 - length("user"))"""
_SIZES = """
CASE WHEN lora_until IS NOT NULL OR CAST(methods AS text) = '["lora"]' THEN 'l'
  WHEN CAST(methods AS text) = '["qlora"]' THEN 'q'
  WHEN CAST(methods AS text) = '["qlora", "lora"]' THEN 'ql'
  WHEN CAST(methods AS text) = '[]' THEN ''
  ELSE 'lq' END
|| '.' || coalesce(CAST(vram_lora AS text), '?') || '.' || coalesce(CAST(vram_qlora AS text), '?')
"""


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    release(op.get_bind(), ["jobs"])
    for name in _OLD:
        op.drop_index(name, table_name="jobs")
    op.execute(
        f"UPDATE jobs SET queue_key = substr(queue_key, 1, 6) || {_LEAST[dialect]} || '.' || {_SIZES}"  # noqa: S608  no input
        " || CASE WHEN gangs IS NULL THEN '' ELSE '.w' END"
        " || CASE WHEN gangs IS NULL AND attempt = 0 THEN '' ELSE '~' || job_id END"
        f" || '|' || replace({_LABELS}, '|', '\\u007c') || '|' || \"user\""
        " WHERE substr(queue_key, 10, 1) = '|'"
    )
    for name, columns in _NEW.items():
        op.create_index(name, "jobs", columns, sqlite_where=_FREE, postgresql_where=_FREE)


def downgrade() -> None:
    for name in _NEW:
        op.drop_index(name, table_name="jobs")
    for name, columns in _OLD.items():
        op.create_index(name, "jobs", columns, sqlite_where=_QUEUED, postgresql_where=_QUEUED)
