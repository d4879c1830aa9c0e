"""loractl report: the evaluation report of a finished job."""

from __future__ import annotations

from pathlib import Path

import click

from loractl.common.errors import UsageError
from loractl.common.text import clean_line
from loractl.scheduler.cli.named import JobName, job_named
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_stores


@click.command()
@click.argument("job", type=JobName(), metavar="JOB")
@click.option("--answers", type=click.IntRange(0), default=3, show_default=True, help="How many answers to show.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the page into this file, like report.html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
def report(job: str, answers: int, html: Path | None, as_json: bool) -> None:
    """Print a job's evaluation report: base against tuned."""
    from . import answer as asked
    from .text import report_text

    settings, store, artifacts = open_stores()
    job_id = job_named(store, job)
    if html is not None:
        _write(html, asked.report_page(store, artifacts, job_id))
        click.echo(f"The report of job {job_id} is in {html}.")
        return
    answer = asked.report(store, artifacts, job_id, settings.user)
    final = "" if answer.final is None else answer.final.sentence
    show(answer, as_json, lambda: report_text(answer.content, detect_screen(), answers, final))
    if not as_json:
        page = f"The page: loractl report {job_id} --html report.html   job by {clean_line(answer.user)}"
        click.echo("\n" + detect_screen().dim(page))


def _write(path: Path, page: bytes) -> None:
    try:
        path.write_bytes(page)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}", "name a file in a folder that exists") from error
