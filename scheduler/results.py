"""Commands that read results: the evaluation report and the adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore
    from loractl.common.tables import Job


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
    screen = render.detect_screen()
    click.echo(render.report_text(raw, screen, answers))
    click.echo(
        "\n" + screen.dim(f"The page: loractl report {job_id} --html report.html   job by {render.plain(job.user)}")
    )


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def adapters(ctx: click.Context, as_json: bool) -> None:
    """List the stored adapters, or pull one into a folder."""
    if ctx.invoked_subcommand is not None:
        return
    from .session import open_session

    _, store = open_session()
    found = store.adapters()
    if as_json:
        rows = [{c.key: getattr(a, c.key) for c in a.__table__.columns} for a in found]
        click.echo(json.dumps(rows, default=lambda value: value.isoformat()))
        return
    click.echo(render.adapter_table(found, store.now(), render.detect_screen()))


@adapters.command("pull")
@click.argument("job_id", type=int, metavar="JOB")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
def adapters_pull(job_id: int, folder: Path) -> None:
    """Copy a job's adapter into a new folder, verified.

    peft's PeftModel.from_pretrained loads it from there.
    """
    from loractl.common.errors import UsageError

    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "name a new folder")
    job, store, prefix = result_of(job_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} can't be made: {error.strerror}") from error
    files = store.pull(prefix, "adapter/", folder)
    size = sum(file.size for file in files.values())
    click.echo(f"The adapter of job {job_id} ({len(files)} files, {size / 1e6:.1f} MB) is in {folder}.")
    click.echo(
        f"Load it on {render.plain(job.base_model)}:  PeftModel.from_pretrained(base, {str(folder)!r})", err=True
    )


def result_of(job_id: int) -> tuple[Job, ArtifactStore, str]:
    """The job, the artifact store and the prefix of its verified result. Raises WrongState while there is none."""
    from loractl.common.artifacts import attempt_prefix, open_store
    from loractl.common.errors import WrongState
    from loractl.common.status import Status

    from .session import open_session

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
