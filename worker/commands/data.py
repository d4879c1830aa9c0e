"""loractl data: show a job's rows as its tokenizer and chat template make them, and what is wrong in them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import click

from loractl.common.errors import ExitCode
from loractl.common.job.file import load_spec
from loractl.common.progress import progress_bar

_SETTINGS = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, like dataset.max_length=512."
)


@click.group()
def data() -> None:
    """Check a job's data, and show it as the trainer sees it."""


@data.command("check")
@click.argument("job_file", type=click.Path(path_type=Path))
@_SETTINGS
@click.option("--gpu", metavar="SIZE", help="Recommend for a card of this size, like 24GiB; else the fleet's largest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def data_check(job_file: Path, overrides: tuple[str, ...], gpu: str | None, as_json: bool) -> None:
    """Find what is wrong with a job's data before it takes a GPU.

    It uses the model's own tokenizer and chat template, and shows lengths, what max_length cuts, findings, and three
    examples. In these, tokens that are not learned are dimmed. Exits with 2 when the trainer would refuse the data.
    """
    spec = load_spec(job_file, overrides)
    room = _room(gpu)

    from loractl.worker.base.model import load_tokenizer
    from loractl.worker.data.check import advice_for, check_data
    from loractl.worker.data.prompt import templated, today
    from loractl.worker.data.text import check_text

    tokenizer = templated(load_tokenizer(spec.base_model, spec.revision), spec.dataset.template, today())
    with progress_bar() as report:
        checked = check_data(spec, tokenizer, report)
    checked = replace(checked, advice=advice_for(spec, checked, room))
    if as_json:
        click.echo(json.dumps(checked.as_json()))
    else:
        click.echo(check_text(spec, checked, tokenizer, styled=sys.stdout.isatty()))
    if checked.errors:
        sys.exit(ExitCode.USAGE)


@data.command("show")
@click.argument("job_file", type=click.Path(path_type=Path))
@_SETTINGS
@click.option("--row", type=int, help="The row to show; else the first that is trained on.")
@click.option("--json", "as_json", is_flag=True, help="Print the tokens as JSON.")
def data_show(job_file: Path, overrides: tuple[str, ...], row: int | None, as_json: bool) -> None:
    """Show one training example, with its learned tokens marked.

    On a terminal, tokens that are not learned are dimmed. Elsewhere, learned tokens are in [[brackets]].
    """
    spec = load_spec(job_file, overrides)

    from loractl.worker.base.model import load_tokenizer
    from loractl.worker.data.prompt import templated, today
    from loractl.worker.data.text import row_text, trained_row

    tokenizer = templated(load_tokenizer(spec.base_model, spec.revision), spec.dataset.template, today())
    shown = trained_row(spec, tokenizer, row)
    if as_json:
        click.echo(json.dumps(shown.as_json()))
    else:
        click.echo(row_text(spec.dataset, shown, tokenizer, styled=sys.stdout.isatty()))


def _room(gpu: str | None) -> int | None:
    """Bytes of the card to recommend for: the given one, or the largest that has reported here."""
    from loractl.common.placement.cards import MARGIN_BYTES
    from loractl.common.settings import load_settings
    from loractl.common.units import size_of

    if gpu is not None:
        return max(0, size_of("--gpu", gpu) - MARGIN_BYTES)
    settings = load_settings()
    if settings.embedded_database and not settings.home.exists():
        return None  # don't create a database just to look at data
    from loractl.common.store.database import connect
    from loractl.common.store.store import Store

    cards = Store(connect(settings)).cards.fleet().cards.values()
    return max((card.usable for card in cards if not card.processor), default=None)
