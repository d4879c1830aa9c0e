"""loractl retry: queue jobs again."""

from __future__ import annotations

import click


@click.command()
@click.argument("job_ids", nargs=-1, required=True, type=int, metavar="JOB...")
def retry(job_ids: tuple[int, ...]) -> None:
    """Queue failed, cancelled or held jobs again."""
    from loractl.common.errors import ServiceUnreachable
    from loractl.common.queue.sender import open_sender
    from loractl.scheduler.session import open_session

    from .several import for_each

    settings, store = open_session()
    with open_sender(settings) as sender:

        def queue(job_id: int) -> None:
            job = store.retry(job_id, settings.user)
            click.echo(f"Job {job_id} is queued again.")
            try:
                sender.wake([job.vram_class])
            except ServiceUnreachable as error:
                click.echo(f"Warning: {error.sentence}\nJob {job_id} still starts, a little later.", err=True)

        for_each(job_ids, queue)
