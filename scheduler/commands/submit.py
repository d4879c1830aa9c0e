"""loractl submit: check the job file and its data, store the data, write the row, wake the workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import ExitCode, ServiceUnreachable

if TYPE_CHECKING:
    from loractl.common.data.findings import Finding
    from loractl.common.job.spec import JobSpec
    from loractl.common.settings import Settings
    from loractl.common.store.records import Submission
    from loractl.common.store.store import Store


@click.command()
@click.argument("job_files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, like training.max_steps=20."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved job and queue nothing.")
@click.option("--wait", is_flag=True, help="Follow the job; exit 0 when it succeeded, 1 when not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def submit(job_files: tuple[Path, ...], overrides: tuple[str, ...], dry_run: bool, wait: bool, as_json: bool) -> None:
    """Queue the jobs of one or more job files.

    Every file is checked before any is queued. A local data set is uploaded to the artifact store.
    """
    from loractl.common.job.file import load_spec

    specs = [load_spec(path, overrides) for path in job_files]
    for spec, path in zip(specs, job_files, strict=True):
        warn_of_data(spec, path)
    if dry_run:
        _print_resolved(specs, as_json)
        return
    from loractl.scheduler.session import open_session

    settings, store = open_session()
    submitted = [_submit(spec, settings, store, quiet=as_json) for spec in specs]
    if as_json:
        from loractl.scheduler.answers.job import job_state

        click.echo(json.dumps([job_state(store, job_id).as_json() for job_id in submitted]))
    if wait:
        from .follow import follow

        outcomes = [follow(store, job_id) for job_id in submitted]
        sys.exit(max(outcomes, default=ExitCode.OK))
    if not as_json:
        click.echo(click.style(f"Follow it: loractl status {submitted[-1]} --watch", dim=True), err=True)


def warn_of_data(spec: JobSpec, path: Path) -> None:
    """Check the job's local data; what looks wrong in them and is no error is said. Raises DataError."""
    from loractl.common.text import clean_line

    warnings = [finding for finding in check_data(spec) if finding.level == "warning"]
    for finding in warnings:
        click.echo(clean_line(f"Warning: {Path(spec.dataset.path).name}: {finding.sentence}."), err=True)
    if warnings:
        click.echo(click.style(f"See the data: loractl data check {path}", dim=True), err=True)


def check_data(spec: JobSpec) -> list[Finding]:
    """Refuse local data that the trainer would refuse, as far as no tokenizer is needed, and say what looks wrong.

    Raises DataError. Empty for data of the hub, and for parquet where pyarrow is missing: the trainer checks them.
    """
    from loractl.common.data.findings import check_examples
    from loractl.common.data.formats import detect_format, map_columns, parse_examples
    from loractl.common.data.labels import check_taught
    from loractl.common.data.rows import read_rows
    from loractl.common.data.split import split_data
    from loractl.common.errors import DataError
    from loractl.common.job.hub_name import is_hub_data
    from loractl.common.job.sections import DataFormat

    dataset = spec.dataset
    for text in spec.data_sets().values():
        if not _is_local(text) and not is_hub_data(text):
            hint = "name a file (jsonl, json, csv, parquet) beside the job file, or a hub id like owner/name"
            raise DataError(text, "is no file here, and no data set of the hub", hint=hint)
    readable = [text for text in spec.data_sets().values() if _is_local(text)]
    rows = {text: read_rows(Path(text)) for text in readable if not _unreadable_here(text)}
    if (other := spec.evaluation.regression) in rows:
        parse_examples(rows[other], detect_format(rows[other], other)[0], other, dataset.on_bad_row)
    if dataset.path not in rows:
        return []
    if dataset.eval_path is not None and dataset.eval_path not in rows:  # what is held out can't be read here
        mine = map_columns(rows[dataset.path], dataset.columns, dataset.path)
        format = detect_format(mine, dataset.path, dataset.format)[0]
        examples = parse_examples(mine, format, dataset.path, dataset.on_bad_row)[0]
        if format is DataFormat.CLASSIFICATION:
            check_taught(examples, dataset.path)
        return check_examples(examples, [])
    split = split_data(dataset, rows[dataset.path], rows[dataset.eval_path] if dataset.eval_path else None)
    return check_examples(split.train, split.held_out, split.overlap)


def _submit(spec: JobSpec, settings: Settings, store: Store, *, quiet: bool) -> int:
    from loractl.scheduler.submission.need import plan_job

    return enqueue(plan_job(spec, settings.user, store_data(spec, settings), store), settings, store, quiet=quiet)


def enqueue(submission: Submission, settings: Settings, store: Store, *, quiet: bool) -> int:
    """Write the job, wake the workers, and say so."""
    spec, job_id = submission.spec, store.submit(submission)
    if not quiet:
        purpose = f", {submission.purpose}" if submission.purpose else ""
        click.echo(f"Job {job_id} ({spec.name}) is queued{purpose}.")
    job = store.job(job_id)
    warn_of_need(job_id, spec, job.vram_needed, store)
    wake_for([job.vram_class], settings, f"Job {job_id} is safe in the database and starts")
    return job_id


def wake_for(vram_classes: Iterable[int], settings: Settings, safe: str) -> None:
    """Wake the workers; with the queue away `safe` says what that means."""
    from loractl.common.queue.hints import wake

    try:
        for vram_class in vram_classes:
            wake(settings, vram_class)
    except ServiceUnreachable as error:
        click.echo(f"Warning: {error.sentence}", err=True)
        click.echo(f"{safe} when the queue is back.", err=True)


def store_data(spec: JobSpec, settings: Settings) -> dict[str, Any]:
    """Upload the local data sets, so that a worker on another box has them."""
    from loractl.common.artifacts import open_store

    stored: dict[str, Any] = {}
    for key, text in spec.data_sets().items():
        if _is_local(text):
            uri, digest = open_store(settings).put_dataset(Path(text))
            stored[key] = {"uri": uri, "sha256": digest}
    return stored


def warn_of_need(job_id: int, spec: JobSpec, least: int | None, store: Store) -> None:
    """Say at once what would make the job wait for ever, or fail on its worker."""
    from loractl.common.units import gib

    if Path(spec.base_model).is_absolute() and not Path(spec.base_model).exists():
        click.echo(
            f"Warning: there is no {spec.base_model} on this machine; every worker needs it at that path.", err=True
        )
    for text in spec.data_sets().values():
        if not _is_local(text):
            click.echo(f"Note: {text} is no file here and is taken for a data set on the hub.", err=True)
    largest = max((node.usable for node in store.nodes()), default=None)
    if least is not None and largest is not None and least > largest:
        click.echo(
            f"Warning: job {job_id} needs {gib(least)} GiB by its plan, the largest device known has {gib(largest)}.",
            err=True,
        )


def _print_resolved(specs: list[JobSpec], as_json: bool) -> None:
    resolved = [spec.model_dump(mode="json") for spec in specs]
    if as_json:
        click.echo(json.dumps(resolved))
        return
    import yaml

    for value in resolved:
        click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)


def _is_local(text: str) -> bool:
    """load_spec has made every local path absolute; what is left is a hub id."""
    return Path(text).is_absolute()


def _unreadable_here(text: str) -> bool:
    """Parquet needs pyarrow, which the light client does not have: the trainer checks it."""
    import importlib.util

    return text.lower().endswith(".parquet") and importlib.util.find_spec("pyarrow") is None and Path(text).exists()
