"""A job that waits for another one is not held for that: `held` is a person's or the lab's (revision 0046)."""

import importlib

import sqlalchemy as sa
from alembic import op

from loractl.common.store.checks import release

revision = "0046"
down_revision = "0045"
branch_labels = None
depends_on = None

_EARLIER = importlib.import_module("loractl.migrations.versions.0043_predict_durations")


def upgrade() -> None:
    op.execute("UPDATE jobs SET held = held_too WHERE awaits IS NOT NULL")
    if op.get_bind().dialect.name == "sqlite":
        release(op.get_bind(), ["jobs"])  # a column that a check names can't be dropped
    op.drop_column("jobs", "held_too")
    _EARLIER._replace_in_submit(_EARLIER._HELD, "")


def downgrade() -> None:
    _EARLIER._replace_in_submit(_EARLIER._LEFT, _EARLIER._HELD + _EARLIER._LEFT)
    op.add_column("jobs", sa.Column("held_too", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE jobs SET held_too = held, held = true WHERE status = 'queued' AND awaits IS NOT NULL")
