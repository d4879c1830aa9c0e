"""loractl adapters show."""

from __future__ import annotations

import click

from loractl.scheduler.cli.named import AdapterName
from loractl.scheduler.cli.output import show


@click.command("show")
@click.argument("adapter", type=AdapterName(), metavar="ADAPTER")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_adapter(adapter: str, as_json: bool) -> None:
    """Show where an adapter comes from: base, data, job, versions."""
    from loractl.scheduler.cli.session import open_stores

    from .answer import lineage
    from .text import lineage_text

    _, store, artifacts = open_stores()
    answer = lineage(store, artifacts, adapter)
    show(answer, as_json, lambda: lineage_text(answer))
