"""Commands that change things: cancel, hold, retry, the database, and shell completion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from loractl.common.store.tables import Job


@click.command()
@click.argument("job_ids", nargs=-1, type=int, metavar="JOB...")
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="All members of a sweep that have not ended.")
def cancel(job_ids: tuple[int, ...], sweep_id: int | None) -> None:
    """Cancel waiting or running jobs.

    A waiting job ends at once; a running one's trainer is asked to stop and killed if it does not within 10 s.
    """
    from loractl.common.errors import UsageError
    from loractl.scheduler.session import open_session

    if bool(job_ids) == (sweep_id is not None):
        raise UsageError("cancel takes jobs, or a sweep", "like loractl cancel 12, or loractl cancel --sweep 3")
    settings, store = open_session()
    if sweep_id is not None:
        for job in store.cancel_sweep(sweep_id, settings.user):
            _tell_cancelled(job)
    for job_id in job_ids:
        _tell_cancelled(store.cancel(job_id, settings.user))


def _tell_cancelled(job: Job) -> None:
    from loractl.common.job.status import Status
    from loractl.common.text import clean_line

    done = "is cancelled" if job.status is Status.CANCELLED else f"is being stopped on {clean_line(job.node or '')}"
    click.echo(f"Job {job.job_id} {done}.")


@click.command()
@click.argument("job_ids", nargs=-1, required=True, type=int, metavar="JOB...")
def retry(job_ids: tuple[int, ...]) -> None:
    """Queue failed, cancelled or held jobs again."""
    from loractl.common.errors import ServiceUnreachable
    from loractl.common.queue.hints import wake
    from loractl.scheduler.session import open_session

    settings, store = open_session()
    for job_id in job_ids:
        job = store.retry(job_id, settings.user)
        click.echo(f"Job {job_id} is queued again.")
        try:
            wake(settings, job.vram_class)
        except ServiceUnreachable as error:
            click.echo(f"Warning: {error.sentence}\nJob {job_id} starts when the queue is back.", err=True)


@click.command()
@click.argument("job_ids", nargs=-1, required=True, type=int, metavar="JOB...")
@click.option("--reason", default="", metavar="TEXT", help="Why; status shows it to the others.")
def hold(job_ids: tuple[int, ...], reason: str) -> None:
    """Keep waiting jobs from starting until loractl retry."""
    from loractl.scheduler.session import open_session

    settings, store = open_session()
    for job_id in job_ids:
        store.hold(job_id, settings.user, " ".join(reason.split()))
        click.echo(f"Job {job_id} is held; loractl retry {job_id} releases it.")


@click.group()
def db() -> None:
    """Look after the database."""


@db.command("upgrade")
def db_upgrade() -> None:
    """Bring the database's tables to this loractl's form. The embedded SQLite does it by itself."""
    from loractl.common.settings import load_settings, redacted
    from loractl.common.store.database import connect, reachable, upgrade

    settings = load_settings()
    with reachable(settings):
        before, after = upgrade(connect(settings, check_schema=False))
    what = (
        f"is already at revision {after}" if before == after else f"went from {before or 'empty'} to revision {after}"
    )
    click.echo(f"{redacted(settings.database_url)} {what}.")


@db.command("backup")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")
def db_backup(file: Path) -> None:
    """Copy the embedded database into a new file; workers may run meanwhile.

    What the jobs have stored is not in it: copy the artifacts as well.
    """
    from loractl.common.settings import load_settings, redacted
    from loractl.common.units import amount
    from loractl.scheduler.upkeep.backup import back_up

    settings = load_settings()
    contents = back_up(settings, file)
    click.echo(f"{contents.jobs} jobs are in {file} ({amount(file.stat().st_size)}).")
    click.echo(f"Copy what they have stored, too: {redacted(settings.artifacts_url)}", err=True)


@db.command("restore")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")
@click.option("--force", is_flag=True, help="Give up what has changed here since the backup.")
def db_restore(file: Path, force: bool) -> None:
    """Put a backup in the place of the embedded database, with all workers stopped."""
    from loractl.common.settings import load_settings
    from loractl.scheduler.upkeep.backup import restore

    contents = restore(load_settings(), file, force=force)
    click.echo(f"{contents.jobs} jobs are back. Those that ran go on with the next loractl worker.")


@db.command("stop")
def db_stop() -> None:
    """Shut the embedded Valkey down.

    Its queue is saved, and the next command that needs it starts it again.
    """
    from loractl.common.queue.valkey import stop_embedded
    from loractl.common.settings import load_settings

    click.echo(
        "The embedded Valkey has stopped." if stop_embedded(load_settings()) else "No embedded Valkey was running."
    )


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the line that turns on shell completion.

    For bash: loractl completion bash >> ~/.bashrc
    """
    lines = {
        "bash": 'eval "$(_LORACTL_COMPLETE=bash_source loractl)"',
        "zsh": 'eval "$(_LORACTL_COMPLETE=zsh_source loractl)"',
        "fish": "_LORACTL_COMPLETE=fish_source loractl | source",
    }
    click.echo(lines[shell])
