"""The command that removes what nobody needs any more."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import datetime as dt

    from loractl.scheduler.upkeep.garbage import Garbage

_LONGEST_S = 100 * 365 * 86400.0
"""What is longer means the same, and would lead out of the calendar."""


@click.command()
@click.option(
    "--keep-last",
    type=click.IntRange(1),
    metavar="N",
    help="Of each user's jobs of one name keep the N newest results; without it all.",
)
@click.option(
    "--older-than",
    default="30d",
    show_default=True,
    metavar="DURATION",
    help="Take data sets and cache entries that nobody has used for so long.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go and change nothing.")
@click.option("--force", is_flag=True, help="Go on where the store has files of jobs that this database does not know.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(keep_last: int | None, older_than: str, dry_run: bool, force: bool, as_json: bool) -> None:
    """Remove stored files that nobody needs any more.

    In the artifact store: what attempts left that are no result, checkpoints of ended jobs, data that no job needs.
    On this machine: work folders of ended jobs and old cache entries. Results go only with --keep-last.
    """
    from loractl.common.artifacts import open_store
    from loractl.scheduler.session import open_session
    from loractl.scheduler.upkeep.garbage import Cleaner, Policy

    policy = Policy(keep_last=keep_last, older_than=_age(older_than))
    settings, store = open_session()
    cleaner = Cleaner(settings, store, open_store(settings), policy)
    if not force:
        _refuse_strange_store(cleaner.unknown_jobs())
    gone = []
    for found in cleaner.find() if dry_run else cleaner.remove():
        gone.append(found)
        if not as_json:
            click.echo(_line(found))
    if as_json:
        rows = [{"kind": g.kind.value, "name": g.name, "size": g.size, "why": g.why} for g in gone]
        click.echo(json.dumps({"dry_run": dry_run, "bytes": _bytes(gone), "removed": rows}))
        return
    click.echo(_sum(gone, dry_run=dry_run))


def _age(text: str) -> dt.timedelta:
    import datetime as dt

    from loractl.common.errors import UsageError
    from loractl.common.units import parse_duration
    from loractl.scheduler.upkeep.garbage import LEAST_AGE

    try:
        age = dt.timedelta(seconds=min(parse_duration(text), _LONGEST_S))
    except ValueError:
        raise UsageError(f"--older-than {text!r} is not a duration", "write it like 30d or 36h") from None
    if age < LEAST_AGE:
        raise UsageError(
            f"--older-than {text} is too short: a submit may be just about to name what it stored", "at least 1d"
        )
    return age


def _refuse_strange_store(unknown: set[int]) -> None:
    """Two databases number their jobs alike: one must not judge what the other one's jobs have stored."""
    from loractl.common.errors import UsageError

    if unknown:
        numbers = ", ".join(map(str, sorted(unknown)[:5])) + (", ..." if len(unknown) > 5 else "")
        raise UsageError(
            f"the artifact store has files of jobs that this database does not know: {numbers}",
            "check LORACTL_DATABASE_URL and LORACTL_ARTIFACTS_URL; if no other database uses that store: --force",
        )


def _line(found: Garbage) -> str:
    from loractl.common.text import clean_line
    from loractl.common.units import amount

    return f"{found.kind.value:<11}  {amount(found.size):>9}  {clean_line(found.name)}  ({clean_line(found.why)})"


def _sum(gone: list[Garbage], *, dry_run: bool) -> str:
    """One sentence; log lines are told apart, for a database keeps their room for new rows."""
    from loractl.common.units import amount
    from loractl.scheduler.upkeep.garbage import Kind

    verb = "Would free" if dry_run else "Freed"
    if not gone:
        return f"{verb} nothing: everything that is stored is needed."
    counts = Counter(found.kind for found in gone)
    logs = sum(found.size for found in gone if found.kind is Kind.LOG)
    parts = ", ".join(f"{kind.value} {counts[kind]}" for kind in Kind if counts[kind])
    lines = f", and {amount(logs)} of log lines in the database" if logs else ""
    return f"{verb} {amount(_bytes(gone))}{lines} ({parts})."


def _bytes(gone: list[Garbage]) -> int:
    """Bytes of files, the database's own left out."""
    from loractl.scheduler.upkeep.garbage import Kind

    return sum(found.size for found in gone if found.kind is not Kind.LOG)
