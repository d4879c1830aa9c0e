"""loractl edit: change what is asked of a job that waits or runs."""

from __future__ import annotations

import click

from .named import JobName, Setting, jobs_named


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JobName(), metavar="JOB...")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    required=True,
    type=Setting(),
    metavar="KEY=VALUE",
    help="A key's new value, like priority=5.",
)
def edit(jobs: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Change the settings of a waiting or running job.

    Before a job begins all may change but its base and its data; while it runs priority, labels and
    resources.time_limit. A job that has begun and waits again takes what leaves its checkpoint valid.
    """
    from loractl.common.queue.sender import open_sender
    from loractl.scheduler.session import open_artifacts, open_session
    from loractl.scheduler.submission.edit import amendment, require_unended, unchecked_rows, unknown_channels
    from loractl.scheduler.submission.intake import wake_for

    from .several import for_each
    from .warnings import hint, warn

    settings, store = open_session()
    with open_sender(settings) as sender:

        def change(job_id: int) -> None:
            require_unended(store, job_id)
            changed = amendment(store, job_id, overrides)
            warn(unknown_channels(changed, settings))
            warn(unchecked_rows(changed, lambda: open_artifacts(settings), lambda: hint("Counting tokens ...")))
            job = store.edit(changed, settings.user)
            click.echo(f"Job {job_id} is changed: {changed.text}.")
            warn(wake_for(job, sender))

        for_each(jobs_named(store, jobs), change)
