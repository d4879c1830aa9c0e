"""Lists of jobs by owner, state, outcome and label, and attempts by time, each by an index (revision 0015)."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_ENDED = sa.text("ended_at IS NOT NULL")
_AT_ONCE = 1000


def upgrade() -> None:
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.String(256), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key"),
    )
    op.create_index("ix_job_labels_jobs", "job_labels", ["key", "value", "job_id"])
    _copy_labels(op.get_bind())
    for column in ("user", "status"):
        op.drop_index(f"ix_jobs_{column}", table_name="jobs")
        op.create_index(f"ix_jobs_{column}", "jobs", [column, "job_id"])
    op.create_index("ix_jobs_outcome", "jobs", ["status", "reason"], postgresql_where=_ENDED, sqlite_where=_ENDED)
    op.create_index("ix_attempts_started", "attempts", ["started_at"])
    op.create_index("ix_attempts_ended", "attempts", ["ended_at"])


def _copy_labels(connection: sa.Connection) -> None:
    """Write the labels of the rows that exist, without labels that are not in loractl's form, as its lists do."""
    read = sa.text(
        "SELECT job_id, CAST(labels AS VARCHAR) FROM jobs WHERE job_id > :after AND CAST(labels AS VARCHAR) <> '{}'"
        " ORDER BY job_id LIMIT :many"
    )
    write = sa.text("INSERT INTO job_labels (job_id, key, value) VALUES (:job_id, :key, :value)")
    after = 0
    while rows := connection.execute(read, {"after": after, "many": _AT_ONCE}).all():
        after = rows[-1][0]
        if found := [{"job_id": n, "key": k, "value": v} for n, text in rows for k, v in _labels(text)]:
            connection.execute(write, found)


def _labels(text: str) -> list[tuple[str, str]]:
    try:
        labels = json.loads(text)
    except ValueError:
        return []
    pairs = labels.items() if isinstance(labels, dict) else ()
    return [(k, v) for k, v in pairs if isinstance(v, str) and len(k) <= 64 and len(v) <= 256 and "\0" not in k + v]


def downgrade() -> None:
    for name in ("ix_attempts_started", "ix_attempts_ended"):
        op.drop_index(name, table_name="attempts")
    op.drop_index("ix_jobs_outcome", table_name="jobs")
    for column in ("user", "status"):
        op.drop_index(f"ix_jobs_{column}", table_name="jobs")
        op.create_index(f"ix_jobs_{column}", "jobs", [column])
    op.drop_table("job_labels")
