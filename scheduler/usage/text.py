"""Usage and quotas on a terminal."""

from __future__ import annotations

import csv
import io

from loractl.common.text import clean_line
from loractl.common.units import hours
from loractl.scheduler.cli.screen import Screen, table, wrapped

from .answer import FIGURES, QuotaList, UsageRow, UsageTable


def usage_text(answer: UsageTable, screen: Screen) -> str:
    """A row for each group, and what the columns mean."""
    since = f"since {answer.since.astimezone():%Y-%m-%d %H:%M}"
    if not answer.rows:
        return f"No card was used {since}."
    headers = [answer.by.upper(), "CARD h", "GiB h", "LOST", "WAITED h", "JOBS"]
    rows = [_cells(row) for row in answer.rows]
    if len(rows) > 1:
        rows.append(_cells(answer.total))
    notes = (
        f"Hours of whole cards {since}, what runs now included: a part of a card counts as its GiB of the card's. "
        "LOST: steps after the last checkpoint of attempts that failed. WAITED: until attempts began. JOBS: ended."
    )
    lines = table(headers, rows, screen, right=tuple(headers[1:]))
    return "\n".join([*lines, "", *map(screen.dim, wrapped(notes, "", screen))])


def _cells(row: UsageRow) -> list[str]:
    lost = f"{row.lost_hours / row.card_hours:.0%}" if row.card_hours else "–"
    gib_hours = f"{row.gib_hours:.0f}" if row.gib_hours >= 10 else hours(row.gib_hours)
    figures = (hours(row.card_hours), gib_hours, lost, hours(row.waited_hours), str(row.jobs))
    return [clean_line(row.name), *figures]


def usage_csv(answer: UsageTable) -> str:
    """The rows with their full figures; without the total."""
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow([answer.by, *FIGURES])
    lines.writerows([row.name, *(getattr(row, name) for name in FIGURES)] for row in answer.rows)
    return written.getvalue().rstrip("\n")


def quotas_text(answer: QuotaList, screen: Screen) -> str:
    """Each user's quota, how much of it is used, and what that means now."""
    if not answer.quotas:
        return "No quota is set. Set one: loractl quota set USER 100h/week"
    rows = [[clean_line(quota.user), quota.words, hours(quota.used), answer.means(quota)] for quota in answer.quotas]
    return "\n".join(table(["USER", "CARD HOURS", "USED", "NEW JOBS"], rows, screen, right=("USED",)))
