"""The hours of an attempt's further cards, which revision 0029 left out (revision 0034).

An attempt that ended after that revision has them. So each hour of a card gets what is missing to the sum of all
attempts there, and no more than those on several cards had. A row that can't be read counts nothing.
"""

import importlib
from collections import defaultdict

import sqlalchemy as sa
from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None

_first = importlib.import_module("loractl.migrations.versions.0029_add_usage")

_HAD = (
    'SELECT jobs."user", shares.node, CAST(jobs.labels AS text), CAST(attempts.started_at AS text),'
    " CAST(attempts.ended_at AS text), shares.bytes, 1 FROM attempts JOIN jobs ON jobs.job_id = attempts.job_id"
    " JOIN shares ON shares.job_id = attempts.job_id AND shares.attempt = attempts.attempt AND shares.rank > 0"
    " WHERE attempts.ended_at IS NOT NULL UNION ALL "
    'SELECT jobs."user", attempts.node, CAST(jobs.labels AS text), CAST(attempts.started_at AS text),'
    " CAST(attempts.ended_at AS text), attempts.vram_reserved, 0"
    " FROM attempts JOIN jobs ON jobs.job_id = attempts.job_id"
    " WHERE attempts.ended_at IS NOT NULL AND attempts.node IN (SELECT node FROM shares WHERE rank > 0)"
)
_KEY = ("hour", "user", "node", "label_set")


def upgrade() -> None:
    bind = op.get_bind()
    usage = sa.Table("usage", sa.MetaData(), autoload_with=bind)
    usage.c.hour.type = sa.DateTime(timezone=True)
    totals = {row.node: row.total for row in bind.execute(sa.text("SELECT node, total FROM nodes"))}
    every, further = (defaultdict[tuple[object, ...], float](float) for _ in range(2))
    gib = defaultdict[tuple[object, ...], float](float)
    for user, node, labels, start, end, size, is_further in bind.execute(sa.text(_HAD)):
        for hour, label_set, within in _first.hours_of(labels, start, end):
            if not isinstance(user, str) or not isinstance(node, str) or not isinstance(size, int | None):
                continue
            key, cards = (hour, user, node, label_set), within * _first.part_of(size, totals.get(node))
            every[key] += cards
            if is_further:
                further[key] += cards
                gib[key] += within * (size or 0) / 2**30
    for own_key, cards in further.items():
        values = dict(zip(_KEY, own_key, strict=True))
        own = sa.and_(*(usage.c[name] == value for name, value in values.items()))
        counted = bind.scalar(sa.select(usage.c.card_hours).where(own))
        lacks = min(cards, every[own_key] - (counted or 0.0))
        if lacks < 1e-9:
            continue
        sums = {"card_hours": lacks, "gib_hours": gib[own_key] * lacks / cards}
        if counted is None:
            rest = {"lost_hours": 0.0, "waited_hours": 0.0, "jobs": 0}
            bind.execute(sa.insert(usage).values(**values, **sums, **rest))
        else:
            bind.execute(sa.update(usage).where(own).values({name: usage.c[name] + sums[name] for name in sums}))


def downgrade() -> None:
    pass
