"""loractl why: why a job waits, card by card, and when it will start."""

from __future__ import annotations

import click

from loractl.scheduler.cli import output
from loractl.scheduler.cli.named import JobName, job_named
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_session


@click.command()
@click.argument("job", type=JobName(), metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(job: str, as_json: bool) -> None:
    """Explain why a job waits, card by card, and when it will start."""
    from . import answer as answers
    from .text import why_text

    _, store = open_session()
    job_id = job_named(store, job)
    answer = answers.why(store, job_id, in_other_forms=not as_json)
    output.show(answer, as_json, lambda: why_text(answer, detect_screen()))
