"""loractl show: a job's history, attempts and resolved spec."""

from __future__ import annotations

import click

from loractl.scheduler.cli import output
from loractl.scheduler.cli.named import JobName, job_named
from loractl.scheduler.cli.screen import detect_screen


@click.command()
@click.argument("job", type=JobName(), metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(job: str, as_json: bool) -> None:
    """Show a job's history, attempts and resolved spec."""
    from loractl.scheduler.cli.session import open_session

    from .job import job_history
    from .job_text import history_text

    _, store = open_session()
    job_id = job_named(store, job)
    answer = job_history(store, job_id)
    output.show(answer, as_json, lambda: history_text(answer, detect_screen()))
