"""loractl edit: change what is asked of a job that waits or runs."""

from __future__ import annotations

import click

from loractl.scheduler.cli.named import JobName, Setting, jobs_named


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
    """Change what is asked of a job that waits or runs.

    Before a job begins all may change but its base and its data; while it runs priority, labels and
    resources.time_limit. A job that has begun and waits again takes what leaves its checkpoint valid.
    """
    from loractl.common.queue.sender import open_sender
    from loractl.scheduler.cli.output import hint, warn
    from loractl.scheduler.cli.session import open_artifacts, open_session
    from loractl.scheduler.submit.intake import wake_for

    from .amendment import amendment, require_unended, unchecked_rows, unknown_channels
    from .several import for_each

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
