"""loractl retry: queue jobs again."""

from __future__ import annotations

import click

from .named import JobName, Setting, jobs_named


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JobName(), metavar="JOB...")
@click.option(
    "--set", "overrides", multiple=True, type=Setting(), metavar="KEY=VALUE",
    help="A key's new value, like resources.time_limit=2h; only keys that leave the checkpoint valid.",
)  # fmt: skip
def retry(jobs: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Queue failed, cancelled or held jobs again.

    They go on from their checkpoints, where they have some.
    """
    from loractl.common.queue.sender import open_sender
    from loractl.scheduler.session import open_artifacts, open_session
    from loractl.scheduler.submission.edit import amendment, unchecked_rows, unknown_channels
    from loractl.scheduler.submission.intake import wake_for

    from .several import for_each
    from .warnings import hint, warn

    settings, store = open_session()
    with open_sender(settings) as sender:

        def queue(job_id: int) -> None:
            changed = amendment(store, job_id, overrides) if overrides else None
            if changed is not None:
                warn(unknown_channels(changed, settings))
                warn(unchecked_rows(changed, lambda: open_artifacts(settings), lambda: hint("Counting tokens ...")))
            job = store.retry(job_id, settings.user, changed)
            click.echo(f"Job {job_id} is queued again{f': {changed.text}' if changed else ''}.")
            warn(wake_for(job, sender))

        for_each(jobs_named(store, jobs), queue)
