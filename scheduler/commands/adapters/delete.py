"""loractl adapters delete."""

from __future__ import annotations

import click

from ..named import AdapterName


@click.command()
@click.argument("names", nargs=-1, required=True, type=AdapterName(), metavar="ADAPTER...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(names: tuple[str, ...], yes: bool) -> None:
    """Remove adapters and their reports for good; tagged ones are refused."""
    from loractl.common.errors import WrongState
    from loractl.common.text import clean_line
    from loractl.common.units import amount
    from loractl.scheduler.answers.adapters import stored_adapter
    from loractl.scheduler.session import open_stores

    settings, store, artifacts = open_stores()
    adapters = {adapter.job_id: adapter for adapter, _ in (stored_adapter(store, name) for name in names)}.values()
    for adapter in adapters:
        if adapter.tags_set:
            named = f"{adapter.name}:{adapter.tags_set[0]}"
            hint = f"first: loractl adapters untag {named}"
            raise WrongState(f"the adapter of job {adapter.job_id} is tagged {named}", hint)
        if descendants := store.descendants(adapter.job_id):
            jobs = ", ".join(map(str, descendants[:5])) + (", ..." if descendants[5:] else "")
            raise WrongState(
                f"job {jobs} is to begin from the adapter of job {adapter.job_id}", "wait for it, or cancel it"
            )
    what = ", ".join(f"{clean_line(a.name)} (job {a.job_id}, {amount(a.size)})" for a in adapters)
    if not yes:
        click.confirm(f"Remove {what} with its report, for good?", abort=True, err=True)
    for adapter in adapters:
        if not store.remove_result(adapter.job_id, settings.user, "loractl adapters delete"):
            raise WrongState(f"the adapter of job {adapter.job_id} was removed or tagged by somebody else just now")
        artifacts.remove(adapter.prefix)
        click.echo(f"The adapter of job {adapter.job_id} ({clean_line(adapter.name)}) is removed.")
