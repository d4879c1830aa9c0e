"""loractl import: an Axolotl or LLaMA-Factory configuration as a job file, and a list of what could not be carried."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loractl.common.errors import UsageError
from loractl.common.text import clean_line
from loractl.scheduler.cli.output import show

if TYPE_CHECKING:
    from .configuration import Imported


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

    if output is not None and output.exists():
        raise UsageError(f"{output} exists already", "name a new file")
    imported = import_file(file, output.parent if output is not None else Path())
    if as_json or output is None:
        show(imported, as_json, lambda: _job_file(imported, file).removesuffix("\n"))
    if output is not None:
        try:
            output.write_text(_job_file(imported, file), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{output} can't be written: {error.strerror}") from error
    if not as_json:
        click.echo(_account(imported, file, output), err=True)


def _job_file(imported: Imported, file: Path) -> str:
    """The job file, which says where it comes from."""
    import yaml

    left = clean_line(", ".join(sorted(imported.left_out))) or "nothing"
    head = f"# From {imported.tool}'s {clean_line(file.name)}, by loractl import. Not carried: {left}.\n"
    return head + yaml.safe_dump(imported.job, sort_keys=False, allow_unicode=True)


def _account(imported: Imported, file: Path, output: Path | None) -> str:
    """What was carried, what was left out and why, and what comes next."""
    lines = [f"{len(imported.carried)} settings of {file} ({imported.tool}) are carried."]
    if imported.left_out:
        wide = min(36, max(map(len, imported.left_out)))
        lines.append("Not carried, so the training may not be quite the same:")
        lines += (f"  {key:{wide}}  {why}" for key, why in sorted(imported.left_out.items()))
    if imported.filled_in:
        said = ", ".join(f"{key} {value}" for key, value in imported.filled_in.items())
        lines.append(f"Written out, since {imported.tool} has other defaults: {said}.")
    if imported.not_needed:
        lines.append(f"Not needed here: {', '.join(sorted(imported.not_needed))}.")
    lines.append(f"Check it with its data: loractl data check {output or 'job.yaml'}")
    return "\n".join(map(clean_line, lines))
