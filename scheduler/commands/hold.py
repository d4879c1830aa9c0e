"""loractl hold: keep waiting jobs from starting."""

from __future__ import annotations

import click

from .named import JobName, jobs_named


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JobName(), metavar="JOB...")
@click.option("--reason", default="", metavar="TEXT", help="The reason, which status shows to others.")
def hold(jobs: tuple[str, ...], reason: str) -> None:
    """Keep waiting jobs from starting until loractl retry."""
    from loractl.scheduler.session import open_session

    from .several import for_each

    settings, store = open_session()

    def keep(job_id: int) -> None:
        store.hold(job_id, settings.user, " ".join(reason.split()))
        click.echo(f"Job {job_id} is held; loractl retry {job_id} releases it.")

    for_each(jobs_named(store, jobs), keep)
