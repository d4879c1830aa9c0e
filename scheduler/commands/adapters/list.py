"""loractl adapters list."""

from __future__ import annotations

import click

from loractl.scheduler.commands.output import show


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_adapters(as_json: bool) -> None:
    """List them with their tags."""
    print_adapters(as_json)


def print_adapters(as_json: bool) -> None:
    """Print the stored adapters, as JSON or as a table."""
    from loractl.scheduler.answers.adapters import adapter_list
    from loractl.scheduler.session import open_session
    from loractl.scheduler.text.adapters import adapters_text
    from loractl.scheduler.text.screen import detect_screen

    _, store = open_session()
    answer = adapter_list(store)
    show(answer, as_json, lambda: adapters_text(answer, detect_screen()))
