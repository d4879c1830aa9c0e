"""loractl gc: remove stored files and rows that no one needs any more."""

from __future__ import annotations

import click

from loractl.scheduler.cli.output import show


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
    help="Take data sets and cache entries that were not used for so long, what a retry of jobs that failed so long"
    " ago would go on from, and with --jobs the rows of jobs.",
)
@click.option("--jobs", is_flag=True, help="Take the rows of ended jobs as well; a job that keeps its result stays.")
@click.option("--dry-run", is_flag=True, help="Say what would go and change nothing.")
@click.option("--force", is_flag=True, help="Go on where the store has files of jobs that this database does not know.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(keep_last: int | None, older_than: str, jobs: bool, dry_run: bool, force: bool, as_json: bool) -> None:
    """Remove stored files and rows that no one needs any more.

    In the artifact store: what attempts left that are no result, checkpoints of ended jobs, data that no job needs.
    On this machine: work folders of ended jobs and old cache entries. Results go only with --keep-last,
    rows of ended jobs only with --jobs.
    """
    from loractl.scheduler.cli.session import open_artifacts, open_session

    from .cleaner import Cleaner, Cleared, Policy, parse_age
    from .text import line, total

    policy = Policy(keep_last=keep_last, older_than=parse_age(older_than), past_jobs=jobs)
    settings, store = open_session()
    cleaner = Cleaner(settings, store, open_artifacts(settings), policy)
    if not force:
        cleaner.check_own_store()
    gone = []
    for garbage in cleaner.find() if dry_run else cleaner.remove():
        gone.append(garbage)
        if not as_json:
            click.echo(line(garbage))
    cleared = Cleared(dry_run=dry_run, removed=tuple(gone))
    show(cleared, as_json, lambda: total(cleared))
