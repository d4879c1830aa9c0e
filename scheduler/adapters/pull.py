"""loractl adapters pull."""

from __future__ import annotations

from pathlib import Path

import click

from loractl.scheduler.cli.named import AdapterName


@click.command()
@click.argument("adapter", type=AdapterName(), metavar="ADAPTER")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
def pull(adapter: str, folder: Path) -> None:
    """Copy an adapter into a new folder, verified.

    peft's PeftModel.from_pretrained loads it from there.
    """
    from loractl.common.adapter_config import CONFIG, check_adapter_config, check_adapter_weights
    from loractl.common.artifacts import WEIGHTS
    from loractl.common.binding import result_binding
    from loractl.common.errors import UsageError
    from loractl.common.job.kinds.known import kind_of
    from loractl.common.text import clean_line
    from loractl.common.units import amount
    from loractl.scheduler.cli.session import open_stores

    from .answer import stored_adapter

    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "name a new folder")
    _, store, artifacts = open_stores()
    stored, job = stored_adapter(store, adapter)
    files_of = result_binding(store, job)
    check_adapter_config(artifacts.read_bytes(files_of, f"adapter/{CONFIG}"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} can't be made: {error.strerror}") from error
    files = artifacts.pull(files_of, "adapter/", folder)
    check_adapter_weights(folder / WEIGHTS.removeprefix("adapter/"), stored.job_id)
    size = sum(file.size for file in files.values())
    click.echo(f"The adapter of job {stored.job_id} ({len(files)} files, {amount(size)}) is in {folder}.")
    if not kind_of(job.spec.get("task_type")).writes:  # its base needs the head and its labels first
        click.echo(f"How to load the classifier: {folder}/README.md", err=True)
        return
    base = clean_line(stored.base_model)
    click.echo(f"Load it on {base}:  PeftModel.from_pretrained(base, {str(folder)!r})", err=True)
