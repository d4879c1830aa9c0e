"""A command for several jobs: what can be done is done, and what can't is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click


def for_each(job_ids: Sequence[int], do: Callable[[int], None]) -> None:
    """Do it for each job. Of several, those that can't are named and the others done; the exit status is 1 then.

    Raises JobNotFound and WrongState for a job that was named alone.
    """
    from loractl.common.errors import ExitCode, JobNotFound, WrongState

    refused = False
    for job_id in dict.fromkeys(job_ids):
        try:
            do(job_id)
        except (JobNotFound, WrongState) as error:
            if len(job_ids) == 1:
                raise
            refused = True
            click.echo(f"Error: {error.sentence}", err=True)
    if refused:
        raise click.exceptions.Exit(ExitCode.FAILED)
