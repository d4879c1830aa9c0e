"""loractl adapters: look after the stored adapters."""

from __future__ import annotations

import click

from loractl.scheduler.cli.lazy import Commands, LazyGroup
from loractl.scheduler.cli.output import paged

COMMANDS: Commands = {
    "delete": (
        "loractl.scheduler.adapters.delete:delete",
        "Remove adapters for good, with their reports; a tagged one is refused.",
    ),
    "list": ("loractl.scheduler.adapters.list:list_adapters", "List them with their tags."),
    "pull": ("loractl.scheduler.adapters.pull:pull", "Copy an adapter into a new folder, verified."),
    "show": (
        "loractl.scheduler.adapters.show:show_adapter",
        "Show where an adapter comes from: base, data, job, versions.",
    ),
    "tag": (
        "loractl.scheduler.adapters.tag:tag",
        "Let NAME:TAG mean this adapter; loractl gc keeps it.",
    ),
    "untag": ("loractl.scheduler.adapters.tag:untag", "Forget a tag; the adapter stays."),
    "bind": (
        "loractl.scheduler.adapters.bind:bind",
        "Bind results that an earlier version stored to their rows.",
    ),
    "merge": (
        "loractl.worker.commands.merge:merge",
        "Make a full model of base and adapter, and prove that it is the same.",
    ),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, invoke_without_command=True)
@paged("adapters, the newest")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def adapters(ctx: click.Context, limit: int, after: int | None, as_json: bool) -> None:
    """Look after the stored adapters: list, tag, pull, merge, delete.

    ADAPTER is a job's number (12), a job's name for the newest of that name (support, the same as support:latest), or a
    name and a tag (support:prod).
    """
    if ctx.invoked_subcommand is None:
        from .list import print_adapters

        print_adapters(limit, after, as_json)
