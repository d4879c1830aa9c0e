"""loractl db: care for the database: its form, its backups, its embedded services."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from loractl.common.settings import load_settings, redacted
from loractl.common.units import amount
from loractl.scheduler.cli.output import show

if TYPE_CHECKING:
    from loractl.common.store.roles import RolesDone

    from .answer import Contents


@click.group()
def db() -> None:
    """Manage the database."""


@db.command("upgrade")
@click.option(
    "--backup",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Make a backup first, if there is something to upgrade.",
)
@click.option("--force", is_flag=True, help="Upgrade even while workers serve the older tables.")
def db_upgrade(backup: Path | None, force: bool) -> None:
    """Bring the tables to this loractl's form.

    Stop all workers first. The embedded SQLite does it by itself.
    """
    from .answer import bring_to_head, store_unknown

    settings = load_settings()
    done = bring_to_head(settings, backup, force=force)
    if done.saved is not None:
        click.echo(f"{backup} holds the state before: {_held(done.saved)}.")
    same = done.before == done.after
    if backup is not None and done.saved is None:
        why = f"nothing changes; loractl db backup {backup} makes one" if same else "the database was empty"
        click.echo(f"{backup} was not written: {why}.", err=True)
    way = f"is already at revision {done.after}" if same else f"went from {done.before or 'empty'} to {done.after}"
    click.echo(f"{redacted(settings.database_url)} {way}.")
    if done.quarantined:
        values = f"{done.quarantined} value{'s' * (done.quarantined > 1)}"
        click.echo(f"{values} broke a column's bounds: see loractl status JOB --full, or the table quarantine.")
    if done.never_yielding:
        jobs = f"{done.never_yielding} waiting or running job{'s' * (done.never_yielding > 1)}"
        click.echo(f"{jobs} of before will not yield to shorter jobs (preemptible: false); {_LET_YIELD}")
    if done.roles_wanted:
        click.echo(_ROLES, err=True)
    _tell_of_store(store_unknown(settings))


def _tell_of_store(unknown: str | None) -> None:
    if unknown is not None:
        click.echo(f"The database does not know the lab's artifact store yet: {unknown}.", err=True)
        click.echo("With the lab's LORACTL_ARTIFACTS_URL: loractl lab adopt-store", err=True)


_LET_YIELD = "loractl edit JOB --set preemptible=auto lets one do so."
_ROLES = "Grant the roles their new rights: loractl db roles"


def _held(contents: Contents) -> str:
    many = f"{contents.jobs} job{'' if contents.jobs == 1 else 's'}"
    last = f", last change {contents.last_event[:19]} UTC" if contents.last_event else ""
    return f"{many}, the newest {contents.newest}{last}, revision {contents.revision}" if contents.jobs else many


@db.command("roles")
@click.option("--person", "people", multiple=True, metavar="NAME", help="A login that submits; repeatable.")
@click.option("--box", "boxes", multiple=True, metavar="NAME", help="A login that runs jobs; repeatable.")
@click.option("--web", "pages", multiple=True, metavar="NAME", help="A login that only reads, for loractl web.")
@click.option("--renew", is_flag=True, help="Also give existing logins a new password.")
@click.option("--passwords", type=click.File(), metavar="FILE", help="Read passwords, one line per login; - is stdin.")
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
    from .answer import set_up_roles, store_unknown, wanted_logins

    chosen = None if passwords is None else passwords.read().splitlines()
    settings = load_settings()
    answer = set_up_roles(settings, wanted_logins(people, boxes, pages, chosen), renew=renew)
    show(answer, as_json, lambda: _roles(answer))
    _tell_of_store(store_unknown(settings))


def _roles(answer: RolesDone) -> str:
    """What was done, and each new password, in the URL that its owner needs."""
    made = f"New roles: {', '.join(answer.new_roles)}." if answer.new_roles else "The roles already existed."
    lines = [f"{made} Their rights are those of revision {answer.revision}."]
    for login in answer.logins:
        how = "is a new login" if login.new else "is there" if login.url is None else "has a new password"
        lines.append(f"{login.name} {how}, with the role {login.role}." + ("" if login.url else " Its password stays."))
        lines += [f"    LORACTL_DATABASE_URL={login.url}"] if login.url else []
    if any(login.url for login in answer.logins):
        lines.append("No password is shown again.")
    return "\n".join(lines)


@db.command("backup")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def db_backup(file: Path, as_json: bool) -> None:
    """Copy the database, as of one moment, into a new file.

    Workers may run meanwhile. What the jobs have stored is not in it: copy the artifacts afterwards.
    """
    from .answer import back_up

    settings = load_settings()
    contents = back_up(settings, file)
    show(contents, as_json, lambda: f"{file} ({amount(file.stat().st_size)}) holds {_held(contents)}.")
    if not as_json:
        click.echo(f"Now copy the artifact store, too: {redacted(settings.artifacts_url)}", err=True)


@db.command("restore")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")
@click.option("--force", is_flag=True, help="Discard what has changed in the embedded database since the backup.")
def db_restore(file: Path, force: bool) -> None:
    """Put a backup in the database's place.

    That is the embedded database, or an empty one of PostgreSQL. Stop all workers first, and bring the artifacts back
    before: numbers of jobs that have stored something there are not given again.
    """
    from .answer import SKIPPED_NUMBERS, restore

    done = restore(load_settings(), file, force=force)
    click.echo(f"{_held(done.contents)} are restored. Running jobs continue with the next loractl worker.")
    if done.store_away is not None:
        click.echo(f"{done.store_away}: job numbers skip {SKIPPED_NUMBERS}, so that none is given twice.", err=True)
    if done.roles_wanted:
        click.echo(_ROLES, err=True)


@db.command("stop")
def db_stop() -> None:
    """Shut the embedded Valkey down.

    Its queue is saved, and the next command that needs it starts it again.
    """
    from loractl.common.queue.valkey import stop_embedded

    click.echo(
        "The embedded Valkey has stopped." if stop_embedded(load_settings()) else "No embedded Valkey was running."
    )
