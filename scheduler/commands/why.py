"""loractl why: why a job waits, card by card, and when it will start."""

from __future__ import annotations

import click

from loractl.scheduler.text.screen import detect_screen

from . import output
from .named import JobName, job_named


@click.command()
@click.argument("job", type=JobName(), metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(job: str, as_json: bool) -> None:
    """Explain why a job waits, card by card, and when it will start."""
    from loractl.scheduler.answers import why as answers
    from loractl.scheduler.session import open_session
    from loractl.scheduler.text.why import why_text

    _, store = open_session()
    job_id = job_named(store, job)
    answer = answers.why(store, job_id, with_remedies=not as_json)
    output.show(answer, as_json, lambda: why_text(answer, detect_screen()))
