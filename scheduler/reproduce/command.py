"""loractl reproduce: run a finished job again, and check that it came out the same."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from loractl.common.errors import ExitCode, UsageError
from loractl.scheduler.cli.output import hint, show, warn
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_stores


@click.command()
@click.argument("job_id", type=int, metavar="JOB")
@click.option("--check", "other", type=int, metavar="NEW", help="Say whether NEW has the same result; queue nothing.")
@click.option("--dry-run", is_flag=True, help="List what can't be the same, and queue nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def reproduce(job_id: int, other: int | None, dry_run: bool, as_json: bool) -> None:
    """Run a finished job again, and check that the result is the same.

    Everything comes from the job's row, its report and the artifact store. With --check the exit status is 0 when both
    came out the same, else 1.
    """
    if other is None:
        _repeat(job_id, dry_run=dry_run, as_json=as_json)
        return
    if dry_run:
        raise UsageError("--check queues nothing, with --dry-run or without", "leave out one of them")
    _check(job_id, other, as_json=as_json)


def _repeat(job_id: int, *, dry_run: bool, as_json: bool) -> None:
    from loractl.scheduler.submit.data import data_at_hand
    from loractl.scheduler.submit.intake import enqueue

    from .answer import repetition, submission_of
    from .text import repetition_text

    settings, store, artifacts = open_stores()
    answer = repetition(store, artifacts, settings, job_id)
    with data_at_hand(job_id, answer.data, artifacts) as files:
        submission = submission_of(answer, settings, store)
        if dry_run or not as_json:
            show(answer, as_json, lambda: repetition_text(answer, detect_screen()))
        if dry_run:
            return
        for file in files:
            artifacts.put_dataset(file)  # gets today's date, so that loractl gc leaves it alone
        entry = enqueue(submission, settings, store)
    show(replace(answer, new=entry.job_id), as_json, lambda: entry.sentence)
    warn(entry.warnings)
    if not as_json:
        hint(f"When it has ended: loractl reproduce {job_id} --check {entry.job_id}")


def _check(job_id: int, other: int, *, as_json: bool) -> None:
    from .sameness import sameness
    from .text import sameness_text

    _, store, artifacts = open_stores()
    answer = sameness(store, artifacts, job_id, other)
    show(answer, as_json, lambda: sameness_text(answer, detect_screen()))
    sys.exit(ExitCode.OK if answer.same else ExitCode.FAILED)
