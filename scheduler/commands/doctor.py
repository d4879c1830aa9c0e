"""loractl doctor: whether this installation works, part by part, and what to do where it does not."""

from __future__ import annotations

import os
import sys

import click

from loractl.common.errors import ExitCode
from loractl.scheduler.text.screen import detect_screen

from .output import show


@click.command()
@click.option("--patience", default="10s", show_default=True, metavar="TIME", help="How long a check may take.")
@click.option("--check", "names", multiple=True, metavar="NAME", help="Only this check, and what it needs.")
@click.option("--service", is_flag=True, help="As root on a GPU box: with its worker's settings, and as its user.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(patience: str, names: tuple[str, ...], service: bool, as_json: bool) -> None:
    """Check this installation, and say what to fix.

    Exit status 1 where a line says error. A service that hangs is such a line. Nothing is changed that stays.
    """
    from loractl.scheduler.answers.health.diagnosis import diagnose
    from loractl.scheduler.text.upkeep import health

    if service:
        from loractl.scheduler.setup.checkup import service_diagnosis

        answer = service_diagnosis(names)
    else:
        answer = diagnose(_seconds(patience), names)
    show(answer, as_json, lambda: health(answer, detect_screen()))
    code = ExitCode.OK if answer.ok else ExitCode.FAILED
    if answer.hung:  # Python would wait at its end for threads of libraries that wait for an answer
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _seconds(text: str) -> float:
    from loractl.common.errors import UsageError
    from loractl.common.units import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--patience: {text!r} {error}") from None
    if not 0 < seconds <= 3600:
        raise UsageError(f"--patience: {text!r} is not between 0 and 1h", "like 10s")
    return seconds
