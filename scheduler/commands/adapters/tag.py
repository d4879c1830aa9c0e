"""loractl adapters tag, and untag: the names that people give to adapters."""

from __future__ import annotations

import click

from ..named import AdapterName


@click.command()
@click.argument("adapter", type=AdapterName(), metavar="ADAPTER")
@click.argument("name", metavar="TAG")
def tag(adapter: str, name: str) -> None:
    """Tag an adapter as NAME:TAG; loractl gc keeps it."""
    from loractl.common.job.reference import check_tag, parse_reference
    from loractl.common.text import clean_line
    from loractl.scheduler.session import open_session

    check_tag(name)
    settings, store = open_session()
    row, before = store.tag(parse_reference(adapter), name, settings.user)
    moved = f"; it was job {before}" if before not in (None, row.job_id) else ""
    click.echo(f"{clean_line(row.name)}:{name} is the adapter of job {row.job_id} now{moved}.")


@click.command()
@click.argument("name", metavar="NAME:TAG")
def untag(name: str) -> None:
    """Forget a tag; the adapter stays."""
    from loractl.common.errors import UsageError
    from loractl.common.job.reference import check_tag, parse_reference
    from loractl.scheduler.session import open_session

    reference = parse_reference(name)
    if reference.name is None or ":" not in name:
        raise UsageError(f"{name!r} is not of the form NAME:TAG", "like support:prod")
    check_tag(reference.tag)
    settings, store = open_session()
    click.echo(f"{reference} is forgotten; it was job {store.untag(reference, settings.user)}.")
