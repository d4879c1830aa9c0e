"""loractl lab, join and doctor: set up a lab on its server box, join it by its line, and check it part by part."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from loractl.common.errors import ExitCode, UsageError
from loractl.common.settings import load_settings, redacted
from loractl.common.units import duration, parse_duration, seconds_of
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_session

Command = TypeVar("Command", bound=Callable[..., Any])


def guests(command: Command) -> Command:
    """The options that name who is invited."""
    boxes = click.option("--box", "boxes", multiple=True, metavar="NAME", help="Invite this box; repeatable.")
    people = click.option("--person", "people", multiple=True, metavar="NAME", help="Invite this person; repeatable.")
    address = click.option("--address", metavar="HOST", help="This server box's address, as others reach it.")
    valid = click.option("--valid", default="1h", show_default=True, metavar="TIME", help="How long lines are valid.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return boxes(people(address(valid(as_json(command)))))


@click.group()
def lab() -> None:
    """Set up a lab on this server box, and invite boxes and people."""


@lab.command("init")
@guests
@click.option("--packages", "services", flag_value="packages", help="Run PostgreSQL and Valkey from apt's packages.")
@click.option("--containers", "services", flag_value="containers", help="Run them and S3 with Docker Compose.")
@click.option("--artifacts", metavar="URL", help="With --packages: the store, like file:///lab/loractl.")
@click.option("--network", "networks", multiple=True, metavar="CIDR", help="Also let this network in.")
@click.option("--take-over", is_flag=True, help="With --packages: use PostgreSQL and Valkey that were here before.")
def lab_init(
    boxes: tuple[str, ...],
    people: tuple[str, ...],
    address: str | None,
    valid: str,
    as_json: bool,
    services: str | None,
    artifacts: str | None,
    networks: tuple[str, ...],
    take_over: bool,
) -> None:
    """Make a lab, and print join lines for a box and a person.

    With --box and --person the lines are for those. Without --packages and --containers the lab is on the servers that
    the settings name: say it as the owner of the database. Said again it changes nothing, and prints new lines.
    """
    from .lab import Guest, LabWish, make_lab
    from .text import lab_made

    wanted = _guests(boxes, people) or [Guest(kind="box"), Guest(kind="person")]
    wish = LabWish(services=services, address=address, artifacts_url=artifacts, networks=networks, take_over=take_over)
    answer = make_lab(wish, wanted, _validity(valid))
    show(answer, as_json, lambda: lab_made(answer))


@lab.command("invite")
@guests
def lab_invite(boxes: tuple[str, ...], people: tuple[str, ...], address: str | None, valid: str, as_json: bool) -> None:
    """Print a join line for each box and person named.

    One that is there gets a new password when it joins.
    """
    from .lab import invite_guests
    from .text import invited

    if not (wanted := _guests(boxes, people)):
        raise UsageError("nobody is named", "loractl lab invite --box heron --person ada")
    answer = invite_guests(load_settings(), wanted, address, valid_s=_validity(valid))
    show(answer, as_json, lambda: invited(answer))


@lab.command("adopt-store")
@click.option("--empty", is_flag=True, help="Even without the lab's results; a missing folder is made.")
def lab_adopt_store(empty: bool) -> None:
    """Make the store of these settings the lab's only one.

    Workers and clients refuse any other. For a store that has moved, was restored, or is not known yet; on PostgreSQL
    say it as the owner of the tables.
    """
    from loractl.common.lab_store import SETTING, adopt

    settings, store = open_session()
    before = store.lab.setting(SETTING)
    mark = adopt(settings, store, empty=empty)
    click.echo(f"{redacted(settings.artifacts_url)} is the lab's artifact store.")
    if before not in (None, mark):
        click.echo("It has another mark than the one before: restart the workers.", err=True)


@lab.command("open")
def lab_open() -> None:
    """Let everybody change everybody's jobs."""
    _let_change("open", "Everybody may change everybody's jobs.")


@lab.command("close")
def lab_close() -> None:
    """Let people change their own jobs alone; operators change all."""
    _let_change("own", "People change their own jobs; operators and the lab's owner change all.")


def _let_change(value: str, said: str) -> None:
    _, store = open_session()
    store.lab.set("changes", value)
    click.echo(said)


@lab.command("order")
@click.argument("order", type=click.Choice(["work", "share"]))
def lab_order(order: str) -> None:
    """Try the least work first, or go by use and age as before.

    work: by the work that is left. share: the order of before, until the next release.
    """
    _, store = open_session()
    store.lab.set("order", order)
    said = "the least work first, weighed by use and wait" if order == "work" else "by priority, use and age, as before"
    click.echo(f"Jobs start in this order: {said}.")


@lab.command("give-way")
@click.argument("when", metavar="on|off|TIME")
def lab_give_way(when: str) -> None:
    """Let long jobs yield their cards to much shorter ones, or not.

    on: once they have run for ten minutes, or longer where a stop costs much. TIME: once they have run for this long,
    like 30m, whatever a stop costs. off: never.
    """
    value, said = _give_way(when)
    _, store = open_session()
    store.lab.set("give-way", value)
    click.echo(said)


def _give_way(when: str) -> tuple[str, str]:
    if when in ("on", "off"):
        return when, f"Long jobs yield their cards to much shorter ones{'' if when == 'on' else ' no more'}."
    try:
        seconds = parse_duration(when)
    except ValueError as error:
        raise UsageError(f"{when!r} {error}", "on, off, or a time like 30m") from None
    if not 0 < seconds <= 365 * 24 * 3600:
        raise UsageError(f"{when!r} is not between 0 and 365d", "on, off, or a time like 30m")
    return str(seconds), f"Jobs yield their cards to much shorter ones once they have run for {duration(seconds)}."


@lab.command("operators")
@click.option("--add", "added", multiple=True, metavar="NAME", help="Name this person an operator; repeatable.")
@click.option("--remove", "removed", multiple=True, metavar="NAME", help="No longer this one; repeatable.")
def lab_operators(added: tuple[str, ...], removed: tuple[str, ...]) -> None:
    """Name those who may change everybody's jobs, or list them."""
    _, store = open_session()
    known = (store.lab.setting("operators") or "").split()
    if odd := [name for name in added if len(name.split()) != 1 or not name.isprintable()]:
        raise UsageError(f"{odd[0]!r} is no name of a person", "as LORACTL_USER or the login says it, like ada")
    if unknown := sorted(set(removed) - set(known)):
        raise UsageError(f"{unknown[0]} is no operator", f"operators: {', '.join(known) or 'none'}")
    now = sorted({*known, *added} - set(removed))
    if now != known:
        store.lab.set("operators", " ".join(now))
    is_open = store.lab.setting("changes") == "open"
    rule = "Everybody may change everybody's jobs" if is_open else "People change their own jobs"
    click.echo(f"{rule}. Operators: {', '.join(now) or 'none'}.")


def _guests(boxes: tuple[str, ...], people: tuple[str, ...]) -> list[Any]:
    from .lab import Guest

    return [Guest(kind=kind, name=name) for kind, names in (("box", boxes), ("person", people)) for name in names]


def _validity(text: str) -> float:
    seconds = seconds_of("--valid", text)
    if not 1 <= seconds <= 7 * 24 * 3600:
        raise UsageError(f"--valid: {text!r} is not between 1s and 7d", "like 1h")
    return seconds


@click.command()
@click.argument("line", default="-")
@click.option("--name", metavar="NAME", help="The login, and the box's name.  [default: the machine's, or your login]")
@click.option("--no-service", is_flag=True, help="On a box, as root: write config.toml, and install no service.")
@click.option("--replace", is_flag=True, help="Leave the lab that this machine is in.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def join(line: str, name: str | None, no_service: bool, replace: bool, as_json: bool) -> None:
    """Join a lab with the line that its server box has printed.

    Without LINE, or for -, it is read from stdin. Everything is checked before the line is used. On a GPU box, as root,
    the worker becomes a service.
    """
    from .join import JoinWish
    from .join import join as join_lab
    from .line import read_line
    from .text import joined_lab

    if line == "-":
        if sys.stdin.isatty():
            click.echo("Paste the join line, then Enter:", err=True)
        line = sys.stdin.readline()
    wish = JoinWish(name=name, service=not no_service, replace=replace)
    answer = join_lab(read_line(line), wish)
    show(answer, as_json, lambda: joined_lab(answer, detect_screen()))
    sys.exit(ExitCode.OK if answer.diagnosis.ok else ExitCode.FAILED)


@click.command()
@click.option("--patience", default="10s", show_default=True, metavar="TIME", help="How long a check may take.")
@click.option("--check", "names", multiple=True, metavar="NAME", help="Only this check, and what it needs.")
@click.option("--service", is_flag=True, help="As root on a GPU box: with its worker's settings, and as its user.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(patience: str, names: tuple[str, ...], service: bool, as_json: bool) -> None:
    """Check this installation, and say what to fix.

    Exit status 1 where a line says error. A service that hangs is such a line. Nothing is changed that stays.
    """
    from .health.diagnosis import diagnose
    from .text import health

    if service:
        from loractl.scheduler.lab.health.diagnosis import service_diagnosis

        answer = service_diagnosis(names)
    else:
        answer = diagnose(_patience(patience), names)
    show(answer, as_json, lambda: health(answer, detect_screen()))
    code = ExitCode.OK if answer.ok else ExitCode.FAILED
    if answer.hung:  # at exit Python would wait for library threads that wait for an answer
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _patience(text: str) -> float:
    seconds = seconds_of("--patience", text)
    if not 0 < seconds <= 3600:
        raise UsageError(f"--patience: {text!r} is not between 0 and 1h", "like 10s")
    return seconds
