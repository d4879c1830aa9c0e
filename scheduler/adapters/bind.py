"""loractl adapters bind: bind results that an earlier version stored to their rows."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("names", nargs=-1, metavar="[ADAPTER]...")
def bind(names: tuple[str, ...]) -> None:
    """Bind results of earlier versions to their rows, as they are now; without ADAPTER all of them.

    Each file is read and compared with its manifest, and the weights with their row. From then on every reader refuses
    a result that somebody has changed in the store.
    """
    from loractl.common.errors import ArtifactError, ExitCode
    from loractl.common.text import clean_line
    from loractl.scheduler.cli.session import open_stores

    from .answer import bind_result, results_to_bind

    settings, store, artifacts = open_stores()
    failed = False
    for job_id in results_to_bind(store, names):
        try:
            bind_result(store, artifacts, settings.user, job_id)
            click.echo(f"The result of job {job_id} is bound to its row.")
        except ArtifactError as error:
            failed = True
            click.echo(clean_line(f"Error: job {job_id} is not bound: {error.sentence}"), err=True)
    sys.exit(ExitCode.FAILED if failed else ExitCode.OK)
