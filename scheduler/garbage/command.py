"""loractl gc: remove stored files and rows that no one needs any more."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from loractl.common.text import clean_line
from loractl.common.units import amount
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.session import open_artifacts, open_session

if TYPE_CHECKING:
    from .cleaner import Cleared


@click.command()
@click.option(
    "--keep-last",
    type=click.IntRange(1),
    metavar="N",
    help="Keep only the N newest results of each user's jobs of one name; everybody's.",
)
@click.option(
    "--older-than",
    default="30d",
    show_default=True,
    metavar="DURATION",
    help="Least age of unused data sets, cache entries and files of failed jobs, and with --jobs of jobs' rows.",
)
@click.option("--jobs", is_flag=True, help="Also remove the rows of ended jobs; a job with a result stays.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and change nothing.")
@click.option("--force", is_flag=True, help="Continue even if the store has files of unknown jobs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(keep_last: int | None, older_than: str, jobs: bool, dry_run: bool, force: bool, as_json: bool) -> None:
    """Remove stored files and rows that nobody needs.

    In the artifact store: what attempts left that are no result, checkpoints of ended jobs, data that no job needs.
    On this machine: work folders of ended jobs and old cache entries. Results go only with --keep-last,
    rows of ended jobs only with --jobs.
    """
    from .cleaner import Cleaner, Cleared, Policy, parse_age

    policy = Policy(keep_last=keep_last, older_than=parse_age(older_than), past_jobs=jobs)
    settings, store = open_session()
    cleaner = Cleaner(settings, store, open_artifacts(settings, store), policy)
    if not force:
        cleaner.check_own_store()
    gone = []
    for garbage in cleaner.find() if dry_run else cleaner.remove():
        gone.append(garbage)
        if not as_json:
            what = f"{garbage.kind.value:<11}  {amount(garbage.size):>9}"
            click.echo(f"{what}  {clean_line(garbage.name)}  ({clean_line(garbage.why)})")
    cleared = Cleared(dry_run=dry_run, removed=tuple(gone))
    show(cleared, as_json, lambda: _total(cleared))


def _total(cleared: Cleared) -> str:
    """One sentence for all of it; rows in the database are counted apart from files."""
    from .cleaner import Kind

    verb = "Would free" if cleared.dry_run else "Freed"
    if not cleared.removed:
        return f"{verb} nothing: everything that is stored is needed."
    counts = Counter(garbage.kind for garbage in cleared.removed)
    rows = sum(garbage.size for garbage in cleared.removed if not garbage.kind.is_file)
    parts = ", ".join(f"{kind.value} {counts[kind]}" for kind in Kind if counts[kind])
    stored = f", and about {amount(rows)} of rows in the database" if rows else ""
    return f"{verb} {amount(cleared.size)}{stored} ({parts})."
