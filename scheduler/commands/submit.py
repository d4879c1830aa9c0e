"""loractl submit: check job files and their data, and queue the jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .named import Setting
from .output import show
from .warnings import hint, warn, warn_of_data

if TYPE_CHECKING:
    from loractl.scheduler.answers.submission import JobDrafts


@click.command()
@click.argument("job_files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    type=Setting(),
    metavar="KEY=VALUE",
    help="Override a key, like training.max_steps=20.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved job and queue nothing.")
@click.option("--wait", is_flag=True, help="Follow the job; exit 0 when it succeeded, 1 when not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def submit(job_files: tuple[Path, ...], overrides: tuple[str, ...], dry_run: bool, wait: bool, as_json: bool) -> None:
    """Queue the jobs of one or more job files.

    Every file is checked before any is queued. A local data set is uploaded to the artifact store.
    """
    from loractl.common.job.file import load_spec
    from loractl.scheduler.answers.submission import JobDrafts

    drafts = JobDrafts(specs=tuple(load_spec(path, overrides) for path in job_files))
    for spec, path in zip(drafts.specs, job_files, strict=True):
        warn_of_data(spec, path)
    if dry_run:
        show(drafts, as_json, lambda: _as_yaml(drafts))
    else:
        _queue(drafts, wait=wait, as_json=as_json)


def _queue(drafts: JobDrafts, *, wait: bool, as_json: bool) -> None:
    from loractl.common.errors import ExitCode
    from loractl.scheduler.session import open_stores
    from loractl.scheduler.submission.intake import submit_job

    settings, store, artifacts = open_stores()
    queued = []
    for spec in drafts.specs:
        entry = submit_job(spec, settings, store, artifacts)
        queued.append(entry.job_id)
        if not as_json:
            click.echo(entry.sentence)
        warn(entry.warnings)
    if as_json:
        from loractl.scheduler.answers.job import job_state
        from loractl.scheduler.answers.submission import QueuedJobs

        show(QueuedJobs(jobs=tuple(job_state(store, job_id) for job_id in queued)), as_json, str)
    if wait:
        from .follow import follow

        sys.exit(max((follow(store, job_id) for job_id in queued), default=ExitCode.OK))
    if not as_json:
        hint(f"Follow it: loractl status {queued[-1]} --watch")


def _as_yaml(drafts: JobDrafts) -> str:
    import yaml

    return "".join(yaml.safe_dump(value, sort_keys=False, allow_unicode=True) for value in drafts.as_json()).rstrip(
        "\n"
    )
