"""loractl cancel: end waiting or running jobs."""

from __future__ import annotations

import click


@click.command()
@click.argument("job_ids", nargs=-1, type=int, metavar="JOB...")
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="All members of a sweep that have not ended.")
def cancel(job_ids: tuple[int, ...], sweep_id: int | None) -> None:
    """Cancel waiting or running jobs.

    A waiting job ends at once; a running one's trainer is asked to stop and killed if it does not within 10 s. Of
    several jobs, those that can't be cancelled are named, and the others are.
    """
    from loractl.common.errors import UsageError
    from loractl.scheduler.session import open_session

    from .several import for_each

    if bool(job_ids) == (sweep_id is not None):
        raise UsageError("cancel takes jobs, or a sweep", "like loractl cancel 12, or loractl cancel --sweep 3")
    settings, store = open_session()
    if sweep_id is not None:
        for job in store.cancel_sweep(sweep_id, settings.user):
            _tell(job.job_id, job.node, waited=job.status == "cancelled")

    def end(job_id: int) -> None:
        job = store.cancel(job_id, settings.user)
        _tell(job_id, job.node, waited=job.status == "cancelled")

    for_each(job_ids, end)


def _tell(job_id: int, node: str | None, *, waited: bool) -> None:
    from loractl.common.text import clean_line

    done = "is cancelled" if waited else f"is being stopped on {clean_line(node or '')}"
    click.echo(f"Job {job_id} {done}.")
