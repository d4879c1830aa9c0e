"""Use of the cards, by hour, and quotas of it (revision 0029).

Attempts that have ended count what they reserved. If nothing is known of the card any more, a part of it counts as the
whole. A row that can't be read counts nothing.
"""

import datetime as dt
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_SUMS = ("card_hours", "gib_hours", "lost_hours", "waited_hours")
_HOUR = dt.timedelta(hours=1)
_MOST = 10_000  # hours of an attempt


def upgrade() -> None:
    usage = op.create_table(
        "usage",
        sa.Column("hour", _TIME, primary_key=True),
        sa.Column("user", sa.String(255), primary_key=True),
        sa.Column("node", sa.String(255), primary_key=True),
        sa.Column("label_set", sa.String(16), primary_key=True),
        *(sa.Column(name, sa.Double(), nullable=False) for name in _SUMS),
        sa.Column("jobs", sa.Integer(), nullable=False),
    )
    op.create_index("ix_usage_user", "usage", ["user", "hour"])
    sets = op.create_table(
        "label_sets",
        sa.Column("label_set", sa.String(16), primary_key=True),
        sa.Column("labels", sa.JSON(), nullable=False),
    )
    op.create_table(
        "quotas",
        sa.Column("user", sa.String(255), primary_key=True),
        sa.Column("card_hours", sa.Double(), nullable=False),
        sa.Column("window_s", sa.Integer(), nullable=False),
        sa.Column("soft", sa.Boolean(), nullable=False),
        sa.Column("set_by", sa.String(255), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("used", sa.Double(), nullable=False),
        sa.Column("below_at", _TIME, nullable=True),
    )
    _count_what_was(usage, sets)


def _count_what_was(usage: sa.Table, sets: sa.Table) -> None:
    bind = op.get_bind()
    totals = {row.node: row.total for row in bind.execute(sa.text("SELECT node, total FROM nodes"))}
    rows = bind.execute(
        sa.text(
            'SELECT jobs."user", attempts.node, CAST(jobs.labels AS text), CAST(attempts.started_at AS text),'
            " CAST(attempts.ended_at AS text), attempts.vram_reserved, jobs.attempt = attempts.attempt, jobs.status"
            " FROM attempts JOIN jobs ON jobs.job_id = attempts.job_id WHERE attempts.ended_at IS NOT NULL"
        )
    )
    sums: dict[tuple[dt.datetime, str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    found: dict[str, dict[str, str]] = {}
    for user, node, labels, start, end, size, is_last, status in rows:
        if not isinstance(user, str) or not isinstance(node, str) or not isinstance(size, int | None):
            continue
        hours = list(hours_of(labels, start, end))
        for number, (hour, key, within) in enumerate(hours, start=1):
            if key:
                found[key] = json.loads(labels)
            row = sums[hour, user, node, key]
            row[0] += within * part_of(size, totals.get(node))
            row[1] += within * (size or 0) / 2**30
            row[2] += int(number == len(hours) and bool(is_last) and status in ("succeeded", "failed", "cancelled"))
    new = [
        {
            "hour": hour, "user": user, "node": node, "label_set": key, "card_hours": cards, "gib_hours": gib,
            "lost_hours": 0.0, "waited_hours": 0.0, "jobs": jobs,
        }
        for (hour, user, node, key), (cards, gib, jobs) in sums.items()
    ]  # fmt: skip
    for first in range(0, len(new), 1000):
        bind.execute(sa.insert(usage), new[first : first + 1000])
    if found:
        bind.execute(sa.insert(sets), [{"label_set": key, "labels": labels} for key, labels in found.items()])


def hours_of(labels: str, start: str, end: str) -> Iterator[tuple[dt.datetime, str, float]]:
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


def part_of(size: int | None, total: object) -> float:
    """The part of a card; of an unknown one, the whole."""
    return min(1.0, size / total) if size and isinstance(total, int) and total > 0 else 1.0


def _read(text: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(text)
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)


def _key(labels: dict[str, str]) -> str:
    pairs = sorted((str(key), str(value)) for key, value in labels.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16] if pairs else ""


def downgrade() -> None:
    for table in ("quotas", "label_sets", "usage"):
        op.drop_table(table)
