"""The hours of an attempt's further cards, which no revision before has counted (revision 0034).

An attempt that ended after that revision has them. So each hour of a card gets what is missing to the sum of all
attempts there, and no more than those on several cards had. A row that can't be read counts nothing.
"""

import datetime as dt
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None

_HOUR = dt.timedelta(hours=1)
_MOST = 10_000  # hours of an attempt

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
        for hour, label_set, within in _hours_of(labels, start, end):
            if not isinstance(user, str) or not isinstance(node, str) or not isinstance(size, int | None):
                continue
            key, cards = (hour, user, node, label_set), within * _part_of(size, totals.get(node))
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


def _hours_of(labels: str, start: str, end: str) -> Iterator[tuple[dt.datetime, str, float]]:
    """The hours that an attempt touches, the short name of its labels, and how much of each hour it had; none where
    that can't be read."""
    try:
        began, over, key = _read(start), _read(end), _key(json.loads(labels))
        hour = began.replace(minute=0, second=0, microsecond=0)
    except (AttributeError, TypeError, ValueError):
        return
    while 0 <= (over - began) / _HOUR < _MOST and hour <= over:
        yield hour, key, max(0.0, (min(over, hour + _HOUR) - max(began, hour)) / _HOUR)
        hour += _HOUR


def _part_of(size: int | None, total: object) -> float:
    """The part of a card; of an unknown one, the whole."""
    return min(1.0, size / total) if size and isinstance(total, int) and total > 0 else 1.0


def _read(text: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(text)
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)


def _key(labels: dict[str, str]) -> str:
    pairs = sorted((str(key), str(value)) for key, value in labels.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16] if pairs else ""


def downgrade() -> None:
    pass
