"""loractl matrix: several adapters on several tasks, all on one loaded base, compared with the cost of full copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from loractl.common.errors import UsageError

from .terminal import GPU, IN_4BIT, tell, warn


@click.command()
@click.option("--adapters", required=True, metavar="LIST", help="Adapters of one base, like support,notebook:prod,12.")
@click.option("--data", metavar="LIST", help="Tasks as NAME=FILE,...; else the rows that each adapter's job held out.")
@click.option(
    "--rows", type=click.IntRange(1), default=200, show_default=True, metavar="N", help="The most rows per task."
)
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    metavar="N",
    help="Answers to generate per task, if they are not labels.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="The longest answer, in tokens.",
)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Rows at a time.")
@IN_4BIT
@GPU
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the heat map into this file, like matrix.html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def matrix(html: Path | None, as_json: bool, **options: Any) -> None:
    """Score several adapters on several tasks, on one loaded base.

    Compares each cell with the base on the same rows. Also measures how long a switch takes, and memory and disk of one
    base with adapters against full copies.
    """
    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"{html} can't be written: there is no such folder", "name a file in a folder that exists")
    from loractl.common.settings import load_settings
    from loractl.worker.serving.library import Library
    from loractl.worker.serving.matrix.matrix import MatrixOptions, measure
    from loractl.worker.serving.matrix.view import matrix_page, matrix_text

    measured = measure(Library(load_settings(), warn), MatrixOptions(**options), tell, warn)
    if html is not None:
        html.write_text(matrix_page(measured), "utf-8")
        click.echo(f"The heat map is in {html}.", err=True)
    click.echo(json.dumps(measured.as_json()) if as_json else matrix_text(measured))
