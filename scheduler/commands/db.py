"""loractl db: care for the database: its form, its backups, its embedded services."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def db() -> None:
    """Look after the database."""


@db.command("upgrade")
def db_upgrade() -> None:
    """Bring the database's tables to this loractl's form. The embedded SQLite does it by itself."""
    from loractl.common.settings import load_settings, redacted
    from loractl.common.store.database import connect, reachable
    from loractl.common.store.schema import upgrade

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
