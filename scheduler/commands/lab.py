"""loractl lab: a lab made on its server box, and the lines with which others join it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .output import show

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
    from loractl.scheduler.setup.lab import Guest
    from loractl.scheduler.setup.server_box import LabWish, make_lab
    from loractl.scheduler.text.upkeep import lab_made

    wanted = _guests(boxes, people) or [Guest(kind="box"), Guest(kind="person")]
    wish = LabWish(services=services, address=address, artifacts_url=artifacts, networks=networks, take_over=take_over)
    answer = make_lab(wish, wanted, _seconds(valid))
    show(answer, as_json, lambda: lab_made(answer))


@lab.command("invite")
@guests
def lab_invite(boxes: tuple[str, ...], people: tuple[str, ...], address: str | None, valid: str, as_json: bool) -> None:
    """Print a join line for each box and person named.

    One that is there gets a new password when it joins.
    """
    from loractl.common.errors import UsageError
    from loractl.common.settings import load_settings
    from loractl.scheduler.setup.lab import invite_guests
    from loractl.scheduler.text.upkeep import invited

    if not (wanted := _guests(boxes, people)):
        raise UsageError("nobody is named", "loractl lab invite --box heron --person ada")
    answer = invite_guests(load_settings(), wanted, address, valid_s=_seconds(valid))
    show(answer, as_json, lambda: invited(answer))


def _guests(boxes: tuple[str, ...], people: tuple[str, ...]) -> list[Any]:
    from loractl.scheduler.setup.lab import Guest

    return [Guest(kind=kind, name=name) for kind, names in (("box", boxes), ("person", people)) for name in names]


def _seconds(text: str) -> float:
    from loractl.common.errors import UsageError
    from loractl.common.units import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--valid: {text!r} {error}") from None
    if not 1 <= seconds <= 7 * 24 * 3600:
        raise UsageError(f"--valid: {text!r} is not between 1s and 7d", "like 1h")
    return seconds
