"""loractl cancel: end waiting or running jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .named import JobName, jobs_named

if TYPE_CHECKING:
    from loractl.common.store.store import Store


@click.command()
@click.argument("jobs", nargs=-1, type=JobName(), metavar="JOB...")
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="All members of a sweep that have not ended.")
@click.option("--user", help="All of this person's jobs that have not ended; me is yourself.")
@click.option("--queued", is_flag=True, help="With --user: only those that wait.")
def cancel(jobs: tuple[str, ...], sweep_id: int | None, user: str | None, queued: bool) -> None:
    """Cancel waiting or running jobs.

    JOB is a number, a range like 3-9, the name of one job, or name:tag.

    A waiting job ends at once; a running one's trainer is asked to stop and killed if it does not within 10 s. Its
    checkpoints are removed. Of several jobs, those that can't be cancelled are named, and the others are.
    """
    from loractl.common.errors import UsageError
    from loractl.scheduler.session import open_session

    from .several import for_each

    if [bool(jobs), sweep_id is not None, user is not None].count(True) != 1 or (queued and user is None):
        hint = "like loractl cancel 12, loractl cancel --sweep 3, or loractl cancel --user me --queued"
        raise UsageError("cancel takes jobs, or a sweep, or a person's jobs", hint)
    settings, store = open_session()
    job_ids = jobs_named(store, jobs)
    if user is not None:
        job_ids = _unfinished(store, settings.user if user == "me" else user, queued=queued)
        if not job_ids:
            click.echo("No such job waits." if queued else "No such job waits or runs.")
    if sweep_id is not None:
        for job in store.cancel_sweep(sweep_id, settings.user):
            _tell(store, job.job_id)

    def end(job_id: int) -> None:
        store.cancel(job_id, settings.user)
        _tell(store, job_id)

    for_each(job_ids, end)


def _unfinished(store: Store, user: str, *, queued: bool) -> list[int]:
    from loractl.common.job.status import Status

    statuses = (Status.QUEUED,) if queued else (Status.QUEUED, Status.RUNNING)
    return sorted(job.job_id for job in store.jobs(statuses=statuses, user=user))


def _tell(store: Store, job_id: int) -> None:
    from loractl.common.job.status import Status
    from loractl.common.text import clean_line
    from loractl.scheduler.answers.job import job_state

    job = job_state(store, job_id)
    if job.status is Status.CANCELLED:
        click.echo(f"Job {job_id} is cancelled.")
        return
    if job.status is not Status.RUNNING:  # it ended before its trainer could be asked to stop
        click.echo(f"Job {job_id} {job.status.in_words}.")
        return
    kept = f"nothing of its training is kept, so loractl retry {job_id} would start again"
    click.echo(f"Job {job_id} is being stopped on {clean_line(job.where)}; {kept}.")
