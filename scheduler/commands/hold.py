"""loractl hold: keep waiting jobs from starting."""

from __future__ import annotations

import click


@click.command()
@click.argument("job_ids", nargs=-1, required=True, type=int, metavar="JOB...")
@click.option("--reason", default="", metavar="TEXT", help="Why; status shows it to the others.")
def hold(job_ids: tuple[int, ...], reason: str) -> None:
    """Keep waiting jobs from starting until loractl retry."""
    from loractl.scheduler.session import open_session

    from .several import for_each

    settings, store = open_session()

    def keep(job_id: int) -> None:
        store.hold(job_id, settings.user, " ".join(reason.split()))
        click.echo(f"Job {job_id} is held; loractl retry {job_id} releases it.")

    for_each(job_ids, keep)
