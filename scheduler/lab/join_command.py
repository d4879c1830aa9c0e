"""loractl join: a GPU box's or a person's machine joins a lab by the line that its server box has printed."""

from __future__ import annotations

import sys

import click

from loractl.common.errors import ExitCode
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.screen import detect_screen


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
