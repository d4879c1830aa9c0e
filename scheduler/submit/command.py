"""loractl submit: check job files and their data, and queue the jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loractl.common.errors import ExitCode, UsageError
from loractl.scheduler.cli.named import Setting
from loractl.scheduler.cli.output import hint, show, warn
from loractl.scheduler.cli.session import open_artifacts, open_session, open_stores, open_to_check

if TYPE_CHECKING:
    from loractl.common.settings import Settings

    from .draft import JobDraft, JobDrafts


@click.command()
@click.argument("job_files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--like", type=int, metavar="JOB", help="In place of files: a submitted job's settings and rows.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    type=Setting(),
    metavar="KEY=VALUE",
    help="Override a key, like training.max_steps=20.",
)
@click.option("--after", "after", multiple=True, type=int, metavar="JOB", help="Start once this job has succeeded.")
@click.option("--dry-run", is_flag=True, help="Check all that submit checks, print the job and queue nothing.")
@click.option("--wait", is_flag=True, help="Follow the job; exit 0 when it succeeded, 1 when not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --wait once the jobs have ended.")
def submit(
    job_files: tuple[Path, ...],
    like: int | None,
    overrides: tuple[str, ...],
    after: tuple[int, ...],
    dry_run: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Queue the jobs of one or more job files.

    A file may hold several jobs, divided by ---. All are checked before they are queued together. A local data set is
    uploaded to the artifact store.
    """
    from .draft import JobDrafts, like_job, of_files, started_after
    from .preflight import check_addresses

    if bool(job_files) is (like is not None):
        raise UsageError("submit takes job files, or --like JOB", "like loractl submit job.yaml")
    settings = check_addresses()
    drafts = of_files(job_files, overrides) if like is None else [like_job(open_session()[1], like, overrides)]
    drafts = [started_after(draft, after) for draft in drafts]
    if dry_run:
        _check(drafts, settings)
        resolved = JobDrafts(specs=tuple(draft.spec for draft in drafts))
        show(resolved, as_json, lambda: _as_yaml(resolved))
    else:
        _queue(drafts, wait=wait, as_json=as_json)


def _check(drafts: Sequence[JobDraft], settings: Settings) -> None:
    """Submit's checks before it queues, with nothing written; it prints what is doubtful."""
    from .admission import check_all
    from .intake import doubts_of, too_large

    (store, unknown), artifacts = open_to_check(settings), open_artifacts(settings, None)
    planned, doubts = check_all(drafts, settings, store, artifacts)
    for submission in planned:
        name = submission.spec.name
        doubts += [*doubts_of(name, submission, settings), *too_large(name, submission, store)]
    warn(dict.fromkeys([*doubts, *([unknown] if unknown else [])]))


def _queue(drafts: Sequence[JobDraft], *, wait: bool, as_json: bool) -> None:
    from .admission import queue_all

    settings, store, artifacts = open_stores()
    entries = queue_all(drafts, settings, store, artifacts, tell=str if as_json else click.echo)
    queued = [entry.job_id for entry in entries]
    ended = ExitCode.OK
    if wait:
        from loractl.scheduler.status.follow import follow

        ended = max((follow(store, job_id, on_stderr=as_json) for job_id in queued), default=ExitCode.OK)
    if as_json:
        from loractl.scheduler.status.job import job_state

        from .draft import QueuedJobs

        show(QueuedJobs(jobs=tuple(job_state(store, job_id) for job_id in queued)), as_json, str)
    if wait:
        sys.exit(ended)
    if not as_json:
        hint(f"Follow it: loractl status {queued[-1]} --watch")


def _as_yaml(drafts: JobDrafts) -> str:
    import yaml

    jobs = (yaml.safe_dump(value, sort_keys=False, allow_unicode=True) for value in drafts.as_json())
    return "---\n".join(jobs).rstrip("\n")
