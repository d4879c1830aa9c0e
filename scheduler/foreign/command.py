"""loractl import: an Axolotl or LLaMA-Factory configuration as a job file, and a list of what could not be carried."""

from __future__ import annotations

from pathlib import Path

import click

from loractl.common.errors import UsageError
from loractl.scheduler.cli.output import show


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the job file here.")
@click.option("--json", "as_json", is_flag=True, help="Print the job and what was left out as JSON.")
def import_config(file: Path, output: Path | None, as_json: bool) -> None:
    """Turn an Axolotl or LLaMA-Factory YAML into a job file.

    The job file goes to standard output unless -o names a file. What could not be carried, and why, goes to standard
    error.
    """
    from .configuration import import_file
    from .text import account, job_file

    if output is not None and output.exists():
        raise UsageError(f"{output} exists already", "name a new file")
    imported = import_file(file, output.parent if output is not None else Path())
    if as_json or output is None:
        show(imported, as_json, lambda: job_file(imported, file).removesuffix("\n"))
    if output is not None:
        _write(output, job_file(imported, file))
    if not as_json:
        click.echo(account(imported, file, output), err=True)


def _write(output: Path, text: str) -> None:
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{output} can't be written: {error.strerror}") from error
