"""The evaluation report of a finished job, and what else its result holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.common.text import clean_line
from loractl.scheduler.text.report import report_text
from loractl.scheduler.text.screen import detect_screen

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore
    from loractl.common.store.tables import Job


@click.command()
@click.argument("job_id", type=int, metavar="JOB")
@click.option("--answers", type=click.IntRange(0), default=3, show_default=True, help="So many answers side by side.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the page into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
def report(job_id: int, answers: int, html: Path | None, as_json: bool) -> None:
    """Print a job's evaluation report: base against tuned."""
    from loractl.common.errors import UsageError

    job, store, prefix = result_of(job_id)
    if html is not None:
        page = store.read_bytes(prefix, "report.html")
        try:
            html.write_bytes(page)
        except OSError as error:
            raise UsageError(
                f"{html} can't be written: {error.strerror}", "name a file in a folder that exists"
            ) from error
        click.echo(f"The report of job {job_id} is in {html}.")
        return
    raw: dict[str, Any] = store.read_json(prefix, "report.json")
    if as_json:
        click.echo(json.dumps(raw))
        return
    screen = detect_screen()
    click.echo(report_text(raw, screen, answers))
    click.echo(
        "\n" + screen.dim(f"The page: loractl report {job_id} --html report.html   job by {clean_line(job.user)}")
    )


def result_of(job_id: int) -> tuple[Job, ArtifactStore, str]:
    """The job, the artifact store and the prefix of its verified result. Raises WrongState while there is none."""
    from loractl.common.artifacts import attempt_prefix, open_store
    from loractl.common.errors import WrongState
    from loractl.common.job.status import Status
    from loractl.scheduler.session import open_session

    settings, store = open_session()
    job = store.job(job_id)
    if job.status is not Status.SUCCEEDED:
        state = {Status.FAILED: "it has failed", Status.CANCELLED: "it was cancelled"}.get(
            job.status, f"it is {job.status.value}"
        )
        raise WrongState(f"job {job_id} has no result: {state}", f"loractl status {job_id} shows where it stands")
    if job.report_uri is None:
        raise WrongState(
            f"job {job_id} has no result any more: loractl gc has removed it",
            f"loractl show {job_id} says who and when",
        )
    return job, open_store(settings), attempt_prefix(job_id, job.attempt)
