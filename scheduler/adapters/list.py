"""loractl adapters list."""

from __future__ import annotations

import click

from loractl.scheduler.cli.output import paged, show_page


@click.command("list")
@paged("adapters, the newest")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_adapters(limit: int, after: int | None, as_json: bool) -> None:
    """List them with their tags."""
    print_adapters(limit, after, as_json)


def print_adapters(limit: int, after: int | None, as_json: bool) -> None:
    """Print a page of the stored adapters, as JSON or as a table."""
    from loractl.common.store.records import Page
    from loractl.scheduler.cli.screen import detect_screen
    from loractl.scheduler.cli.session import open_session

    from .answer import adapter_list
    from .text import adapters_text

    _, store = open_session()
    answer = adapter_list(store, Page(limit=limit, after=after))
    show_page(answer, as_json, lambda: adapters_text(answer, detect_screen()))
