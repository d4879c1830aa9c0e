"""How a command follows a job to its end."""

from __future__ import annotations

import sys
import time

import click

from loractl.common.errors import ExitCode
from loractl.common.job.status import Status
from loractl.common.store.store import Store
from loractl.scheduler.cli.screen import REDRAW_S, LiveText, detect_screen

from .job import JobState, held_out_losses, job_in_full, job_state
from .job_text import job_text, state_line

POLL_S = 1.0


def follow(store: Store, job_id: int, *, on_stderr: bool = False) -> ExitCode:
    """Watch a job until it has ended or is held: redrawn on a terminal, elsewhere one line per change. `on_stderr`: all
    of it, since stdout is for JSON.

    Ctrl-C leaves the job alone, says so, and raises click's Exit.
    """
    try:
        redraws = sys.stdout.isatty() and not on_stderr
        job = _redraw(store, job_id) if redraws else _tell_changes(store, job_id, on_stderr=on_stderr)
    except KeyboardInterrupt:
        again = f"loractl status {job_id} --watch; stop it: loractl cancel {job_id}"
        click.echo(f"\nJob {job_id} continues: {again}", err=True)
        raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None
    return ExitCode.OK if job.status is Status.SUCCEEDED else ExitCode.FAILED


def _redraw(store: Store, job_id: int) -> JobState:
    live = LiveText()
    while True:
        answer = job_in_full(store, job_id)
        over = is_over(store, answer.job)
        live.draw(job_text(answer, detect_screen()), last=over)
        if over:
            return answer.job
        time.sleep(REDRAW_S)


def _tell_changes(store: Store, job_id: int, *, on_stderr: bool) -> JobState:
    said = ""
    while True:
        job = job_state(store, job_id)
        if (line := change_line(store, job)) != said:
            click.echo(line, err=True)
            said = line
        if is_over(store, job):
            waits = f"it waits for job {job.awaits}, which does not go on by itself"
            click.echo(f"Job {job_id} {job.status.value}: {job.message or waits}", err=on_stderr)
            return job
        time.sleep(POLL_S)


def change_line(store: Store, job: JobState) -> str:
    """The job's state in a line that only changes when something happened."""
    return state_line(job, held_out_losses(store, job.job_id))


def is_over(store: Store, job: JobState) -> bool:
    """Whether the job has ended, or starts only once a person does something."""
    return job.status.is_terminal or job.held or (job.awaits is not None and _is_stuck(store, job.job_id))


def _is_stuck(store: Store, job_id: int) -> bool:
    """Whether a waiting job starts only when a person releases or retries another job."""
    row = store.jobs.get(job_id)
    while row.status is Status.QUEUED and row.awaits is not None and row.awaits < row.job_id:  # else a person wrote it
        awaited = store.jobs.numbered([row.awaits]).get(row.awaits)
        if awaited is None or awaited.status in (Status.FAILED, Status.CANCELLED):
            return awaited is None or not row.after_any
        row = awaited
    return row.status is Status.QUEUED and (row.held or row.awaits is not None)
