"""loractl import: an Axolotl or LLaMA-Factory configuration as a job file, and a list of what could not be carried."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import yaml

from loractl.common.errors import UsageError
from loractl.common.text import clean_line
from loractl.scheduler.foreign.axolotl import from_axolotl
from loractl.scheduler.foreign.llama_factory import from_llama_factory
from loractl.scheduler.foreign.translation import (
    Imported,
    get_key,
    short,
    unset_key,
)

_FREE = {"columns", "lr_scheduler_kwargs"}  # mappings whose keys are a person's


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the job file here.")
@click.option("--json", "as_json", is_flag=True, help="Print the job and what was left out as JSON.")
def import_config(file: Path, output: Path | None, as_json: bool) -> None:
    """Turn an Axolotl or LLaMA-Factory YAML into a job file.

    It goes to standard output unless -o names a file; what could not be carried, and why, goes to standard error.
    """
    if output is not None and output.exists():
        raise UsageError(f"{output} exists already", "name a new file")
    imported = import_file(file, output.parent if output is not None else Path())
    if as_json:
        click.echo(json.dumps(vars(imported)))
    left = clean_line(", ".join(sorted(imported.left_out))) or "nothing"
    text = f"# From {imported.tool}'s {clean_line(file.name)}, by loractl import. Left out: {left}.\n"
    text += yaml.safe_dump(imported.job, sort_keys=False, allow_unicode=True)
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{output} can't be written: {error.strerror}") from error
    elif not as_json:
        click.echo(text, nl=False)
    if not as_json:
        click.echo(_account(imported, file, output), err=True)


def import_file(file: Path, folder: Path) -> Imported:
    """Read another tool's file for a job file in `folder`: local paths are written as seen from there.

    Raises SpecError for what is no YAML mapping, UsageError for another tool's file and for what is no LoRA on rows.
    """
    from loractl.common.job.document import read_yaml

    theirs = {str(key): value for key, value in read_yaml(file)[0].items() if value is not None}
    if "model_name_or_path" in theirs:
        imported = from_llama_factory(theirs, file, folder)
    elif "base_model" in theirs and ("datasets" in theirs or "micro_batch_size" in theirs):
        imported = from_axolotl(theirs, file, folder)
    else:
        hint = "Axolotl's files have base_model and datasets, LLaMA-Factory's model_name_or_path and dataset"
        raise UsageError(f"{file} is neither Axolotl's nor LLaMA-Factory's", hint)
    for key in theirs.keys() - imported.carried.keys() - imported.left_out.keys() - set(imported.not_needed):
        imported.leave(key, "loractl has no such setting")
    imported.job = {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("._-")[:63] or "imported", **imported.job}
    _drop_what_is_refused(imported)
    return imported


def _drop_what_is_refused(found: Imported) -> None:
    """Leave out each value that a job file does not take, with its reason. Raises SpecError where it needs one."""
    from pydantic import ValidationError

    from loractl.common.errors import SpecError, SpecProblem
    from loractl.common.job.sections import AS_WRITTEN
    from loractl.common.job.spec import JobSpec

    while True:
        try:
            spec = JobSpec.model_validate(found.job, context=AS_WRITTEN)
        except ValidationError as error:
            told = error.errors()[0]
            key, what = ".".join(str(part) for part in told["loc"] if not isinstance(part, int)), told["msg"]
            if told["type"] == "literal_error":
                what = "is none of those that loractl has"
            if not key:  # what two keys together do not do: "key: sentence", a line each
                key, _, what = what.removeprefix("Value error, ").partition("\n")[0].partition(": ")
            names = [theirs for theirs, ours in found.carried.items() if key == ours or key.startswith(f"{ours}.")]
            if not names or key in ("base_model", "dataset.path"):
                problem = SpecProblem(file=f"the job from {found.tool}", line=None, key=key, what=what)
                raise SpecError([problem]) from None
            for name in names:
                ours = found.carried.pop(name)
                found.leave(name, f"{short(get_key(found.job, ours))}: {what[0].lower()}{what[1:]}")
                unset_key(found.job, ours)
            continue
        break
    resolved = spec.model_dump(mode="json")
    found.job = _in_order(resolved, found.job)


def _in_order(resolved: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The values that are written, as the spec reads them and in its order."""
    return {
        key: _in_order(value, written[key]) if isinstance(value, dict) and key not in _FREE else value
        for key, value in resolved.items()
        if key in written
    }


def _account(found: Imported, file: Path, output: Path | None) -> str:
    total = len(found.carried) + len(found.left_out) + len(found.not_needed)
    lines = [f"{len(found.carried)} of {total} settings of {file} ({found.tool}) are carried."]
    if found.left_out:
        wide = min(36, max(map(len, found.left_out)))
        lines += ["Left out, so the training is not quite the same:"]
        lines += [f"  {key:{wide}}  {why}" for key, why in sorted(found.left_out.items())]
    if found.filled_in:
        said = ", ".join(f"{key} {value}" for key, value in found.filled_in.items())
        lines.append(f"Written out, since {found.tool} takes other defaults: {said}.")
    if found.not_needed:
        lines.append(f"Not needed here: {', '.join(sorted(found.not_needed))}.")
    lines.append(f"Check it with its data: loractl data check {output or 'job.yaml'}")
    return "\n".join(map(clean_line, lines))
