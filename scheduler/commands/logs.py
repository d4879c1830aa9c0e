"""loractl logs: a job's log, as it grows."""

from __future__ import annotations

import time

import click

from loractl.common.text import clean_line

from .named import JobName, job_named

POLL_S = 1.0


@click.command()
@click.argument("job", type=JobName(), metavar="JOB")
@click.option("-f", "--follow", "following", is_flag=True, help="Follow the log until the job has ended.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines, and what follows with -f.")
def logs(job: str, following: bool, tail: int | None) -> None:
    """Print a job's log."""
    from loractl.scheduler.answers.log import job_log, log_since
    from loractl.scheduler.session import open_artifacts, open_session

    settings, store = open_session()
    job_id = job_named(store, job)
    log = job_log(store, lambda: open_artifacts(settings), job_id)
    _print(log.text if tail is None else _last_lines(log.text, tail))
    empty = not log.text
    while following and not log.job.status.is_terminal:
        time.sleep(POLL_S)
        log = log_since(store, log)
        _print(log.text)
        empty = empty and not log.text
    if empty:
        why = "was removed with its result" if log.removed else f"is empty so far ({log.job.status.value})"
        click.echo(f"The log of job {job_id} {why}.", err=True)


def _last_lines(text: str, count: int) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[len(lines) - count :]) if count < len(lines) else text


def _print(text: str) -> None:
    click.echo("\n".join(clean_line(line) for line in text.split("\n")), nl=False)
