"""loractl gpus: the devices of all boxes and what uses them."""

from __future__ import annotations

import click

from loractl.scheduler.text.screen import detect_screen

from .output import show


@click.command()
@click.option("--used", is_flag=True, help="Show what jobs hold now, next to what their plans reserve.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gpus(used: bool, as_json: bool) -> None:
    """List the devices of all boxes and what uses them."""
    from loractl.scheduler.answers.fleet import fleet
    from loractl.scheduler.session import open_session
    from loractl.scheduler.text.fleet import devices

    _, store = open_session()
    answer = fleet(store)
    show(answer, as_json, lambda: devices(answer, detect_screen(), used=used))
