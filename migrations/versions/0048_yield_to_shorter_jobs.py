"""Which jobs yield to much shorter ones, and how often each was stopped (revision 0048).

Jobs of before keep their cards: they say `preemptible: false`, or were submitted when that was the default.
"""

import importlib

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0048"
down_revision = "0047"
branch_labels = None
depends_on = None

_EARLIER = importlib.import_module("loractl.migrations.versions.0043_predict_durations")

_NEW = (
    "  job.yields := coalesce(job.yields, job.preemptible); -- an earlier client's job\n"
    "  job.stops := coalesce(job.stops, 0);\n"
)

_PREEMPTIBLE = "  job.preemptible := coalesce(job.preemptible, false);\n"

_SAY_SO = {
    "sqlite": "UPDATE jobs SET spec = json_set(spec, '$.preemptible', json('false')) "
    "WHERE status IN ('queued', 'running') AND json_type(spec, '$.preemptible') IS NULL",
    "postgresql": "UPDATE jobs SET spec = (spec::jsonb || '{\"preemptible\": false}')::json "
    "WHERE status IN ('queued', 'running') AND spec -> 'preemptible' IS NULL",
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("yields", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("stops", sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET yields = preemptible WHERE preemptible")
    op.execute(_SAY_SO[op.get_bind().dialect.name])
    _EARLIER._replace_in_submit(_PREEMPTIBLE, _PREEMPTIBLE + _NEW)


def downgrade() -> None:
    _EARLIER._replace_in_submit(_PREEMPTIBLE + _NEW, _PREEMPTIBLE)
    if op.get_bind().dialect.name == "sqlite":
        release(op.get_bind(), ["jobs"])  # a column that a check names can't be dropped
    op.drop_column("jobs", "stops")
    op.drop_column("jobs", "yields")
