"""loractl db: care for the database: its form, its backups, its embedded services."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import click

from .output import show


@click.group()
def db() -> None:
    """Look after the database."""


@db.command("upgrade")
def db_upgrade() -> None:
    """Bring the database's tables to this loractl's form. The embedded SQLite does it by itself."""
    from loractl.common.settings import load_settings, redacted
    from loractl.common.store.database import connect, reachable
    from loractl.common.store.roles import has_roles
    from loractl.common.store.schema import upgrade

    settings = load_settings()
    with reachable(settings):
        engine = connect(settings, check_schema=False)
        before, after = upgrade(engine)
        grants_are_old = before != after and has_roles(engine)
    what = (
        f"is already at revision {after}" if before == after else f"went from {before or 'empty'} to revision {after}"
    )
    click.echo(f"{redacted(settings.database_url)} {what}.")
    if grants_are_old:
        click.echo("Give the roles their rights to what is new: loractl db roles", err=True)


@db.command("roles")
@click.option("--person", "people", multiple=True, metavar="NAME", help="A login that submits. You may give several.")
@click.option("--box", "boxes", multiple=True, metavar="NAME", help="A login that runs jobs. You may give several.")
@click.option("--web", "pages", multiple=True, metavar="NAME", help="A login that only reads, for loractl web.")
@click.option("--renew", is_flag=True, help="Give logins that are there a new password, too.")
@click.option("--passwords", type=click.File(), metavar="FILE", help="Read passwords, a line a login; - is stdin.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def db_roles(
    people: tuple[str, ...],
    boxes: tuple[str, ...],
    pages: tuple[str, ...],
    renew: bool,
    passwords: TextIO | None,
    as_json: bool,
) -> None:
    """Let PostgreSQL hold each person and box to its part. Say it as the owner of the tables.

    Say it again after each upgrade, and for each new person or box. New passwords are made and shown once.
    """
    from loractl.common.settings import load_settings
    from loractl.scheduler.text.upkeep import roles
    from loractl.scheduler.upkeep.roles import set_up_roles, wanted_logins

    chosen = None if passwords is None else passwords.read().splitlines()
    answer = set_up_roles(load_settings(), wanted_logins(people, boxes, pages, chosen), renew=renew)
    show(answer, as_json, lambda: roles(answer))


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
