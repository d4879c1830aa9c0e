"""Reservations on shared cards, lines of waiting jobs, fair share, drains and measured memory (revision 0002)."""

import json
import math
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
QUEUED = sa.text("status = 'queued'")
PATIENT = sa.text("status = 'queued' AND lora_until IS NOT NULL")
COLUMNS: dict[str, Callable[[], list[sa.Column[Any]]]] = {
    "jobs": lambda: [
        sa.Column("planned", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column(
            "queue_key", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False, server_default=""
        ),
        sa.Column("methods", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("lora_until", TIME, nullable=True),
        sa.Column("need_key", sa.String(64), nullable=True),
        sa.Column("family", sa.String(64), nullable=True),
        sa.Column("checkpoint", sa.JSON(), nullable=True),
        sa.Column("adjustment", sa.JSON(), nullable=True),
        sa.Column("vram_reserved", sa.BigInteger(), nullable=True),
        sa.Column("preemptible", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("preempted_by", sa.Integer(), nullable=True),
        sa.Column("version", sa.String(32), nullable=True),
        sa.Column("eta_spread_seconds", sa.Double(), nullable=True),
    ],
    "attempts": lambda: [
        sa.Column("vram_allocated", sa.BigInteger(), nullable=True),
        sa.Column("vram_process", sa.BigInteger(), nullable=True),
        sa.Column("device_name", sa.String(255), nullable=True),
        sa.Column("device_kind", sa.String(8), nullable=True),
    ],
    "nodes": lambda: [
        sa.Column("outside_bytes", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("used", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("margin", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("max_jobs", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("user_limit", sa.Integer(), nullable=True),
        sa.Column("instance", sa.String(64), nullable=True),
        sa.Column("labels", sa.JSON(), nullable=False, server_default="{}"),
    ],
}
LINES = {
    "ix_jobs_line": ["status", "queue_key", "job_id"],
    "ix_jobs_line_need": ["status", "queue_key", "vram_needed"],
    "ix_jobs_line_user": ["status", "priority", "user", "job_id"],
    "ix_jobs_waiting": ["status", "job_id"],
    "ix_jobs_class": ["status", "vram_class"],
}


def upgrade() -> None:
    for table, columns in COLUMNS.items():
        for column in columns():
            op.add_column(table, column)
    _fill_waiting_jobs()
    op.drop_index("ix_jobs_waiting", table_name="jobs")
    patience = ["status", "lora_until"]
    op.create_index("ix_jobs_patience", "jobs", patience, postgresql_where=PATIENT, sqlite_where=PATIENT)
    for name, line in LINES.items():
        op.create_index(name, "jobs", line, unique=False, postgresql_where=QUEUED, sqlite_where=QUEUED)
    op.create_index("ix_jobs_need_key", "jobs", ["need_key"], unique=False)
    op.create_table(
        "drains",
        sa.Column("target", sa.String(255), nullable=False),
        sa.Column("user", sa.String(255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("until", TIME, nullable=True),
        sa.Column("now", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("target"),
    )
    op.create_table(
        "uses",
        sa.Column("user", sa.String(255), nullable=False),
        sa.Column("gib_hours", sa.Double(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("user"),
    )


def downgrade() -> None:
    op.drop_table("uses")
    op.drop_table("drains")
    op.drop_index("ix_jobs_need_key", table_name="jobs")
    op.drop_index("ix_jobs_patience", table_name="jobs")
    for name in LINES:
        op.drop_index(name, table_name="jobs")
    waiting = ["priority", "job_id"]
    op.create_index("ix_jobs_waiting", "jobs", waiting, unique=False, postgresql_where=QUEUED, sqlite_where=QUEUED)
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table) as batch:
            for column in columns():
                batch.drop_column(column.name)


def _fill_waiting_jobs() -> None:
    """Jobs from before have no line to wait in; as the policy of this revision writes it."""
    jobs = sa.table(
        "jobs",
        *(sa.column(name) for name in ("job_id", "status", "priority", "user", "vram_needed", "queue_key")),
        sa.column("spec", sa.JSON),
        sa.column("methods", sa.JSON),
    )
    connection = op.get_bind()
    for row in connection.execute(
        sa.select(jobs).where(jobs.c.status.in_(["queued", "running", "failed", "cancelled"]))
    ):
        spec = json.loads(row.spec) if isinstance(row.spec, str) else row.spec
        wanted = spec.get("method", "auto")
        step = 0 if row.vram_needed is None else 1
        if row.vram_needed is not None and row.vram_needed >= 2**30:
            step = 2 + math.floor(8 * math.log2(row.vram_needed / 2**30))
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.job_id == row.job_id)
            .values(
                methods=["lora", "qlora"] if wanted == "auto" else [wanted],
                queue_key=f"{10_000 - row.priority:05d}|{step:03d}||{row.user}",
            )
        )
