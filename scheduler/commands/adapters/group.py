"""loractl adapters: look after the stored adapters."""

from __future__ import annotations

import click

from loractl.scheduler.commands.output import paged
from loractl.scheduler.lazy import Commands, LazyGroup

COMMANDS: Commands = {
    "delete": (
        "loractl.scheduler.commands.adapters.delete:delete",
        "Remove adapters and their reports for good; tagged ones are refused.",
    ),
    "list": ("loractl.scheduler.commands.adapters.list:list_adapters", "List them with their tags."),
    "pull": ("loractl.scheduler.commands.adapters.pull:pull", "Copy an adapter into a new folder, verified."),
    "show": (
        "loractl.scheduler.commands.adapters.show:show_adapter",
        "Show where an adapter comes from: base, data, job, versions.",
    ),
    "tag": (
        "loractl.scheduler.commands.adapters.tag:tag",
        "Tag an adapter as NAME:TAG; loractl gc keeps it.",
    ),
    "untag": ("loractl.scheduler.commands.adapters.tag:untag", "Forget a tag; the adapter stays."),
    "bind": (
        "loractl.scheduler.commands.adapters.bind:bind",
        "Bind results that an earlier version stored to their rows.",
    ),
    "merge": (
        "loractl.worker.commands.merge:merge",
        "Merge base and adapter into a full model, and prove that it is the same.",
    ),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, invoke_without_command=True)
@paged("adapters, the newest")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def adapters(ctx: click.Context, limit: int, after: int | None, as_json: bool) -> None:
    """Manage stored adapters: list, tag, pull, merge, delete.

    ADAPTER is a job's number (12), a job's name for the newest of that name (support, the same as support:latest), or a
    name and a tag (support:prod).
    """
    if ctx.invoked_subcommand is None:
        from .list import print_adapters

        print_adapters(limit, after, as_json)
