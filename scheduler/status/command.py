"""loractl status and logs: what runs and what waits, one job in full, a sweep's members, a log."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from loractl.common.errors import UsageError
from loractl.common.store.records import Choice, Page
from loractl.common.text import clean_line
from loractl.scheduler.cli import output
from loractl.scheduler.cli.named import JobName, job_named, warn_of_unknown_user
from loractl.scheduler.cli.screen import detect_screen, redraw
from loractl.scheduler.cli.session import open_artifacts, open_session

if TYPE_CHECKING:
    from loractl.common.settings import Settings
    from loractl.common.store.store import Store


@click.command()
@click.argument("job", required=False, type=JobName(), metavar="[JOB]")
@click.option("-a", "--all", "everything", is_flag=True, help="List ended jobs too.")
@click.option("--full", is_flag=True, help="Of JOB also its whole history, each attempt, and its resolved settings.")
@click.option("--watch", is_flag=True, help="Redraw until the job has ended; its outcome is the exit status.")
@click.option("--user", help="Only this person's jobs; me is yourself.")
@click.option("--label", metavar="KEY=VALUE", help="Only jobs with this label.")
@output.paged("jobs that wait, or of all with -a")
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="The members of a sweep.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(
    job: str | None,
    everything: bool,
    full: bool,
    watch: bool,
    user: str | None,
    label: str | None,
    limit: int,
    after: int | None,
    sweep_id: int | None,
    as_json: bool,
) -> None:
    """List running and waiting jobs, or show one job.

    Without JOB and -a: running jobs, waiting jobs with the reason, a line a sweep, and how many ended today. With JOB:
    where it is, its losses and memory, and its last events; --full and --json have all that is known of it.
    """
    if watch and as_json:
        raise UsageError("--watch draws for people, --json prints once", "leave one of them out")
    if full and (job is None or watch):
        raise UsageError("--full shows one job, once", "loractl status JOB --full")
    if sweep_id is not None and (job is not None or everything or user or label or after):
        raise UsageError("--sweep lists the members of one sweep", f"alone: loractl status --sweep {sweep_id}")
    settings, store = open_session()
    user = settings.user if user == "me" else user
    if user is not None:
        warn_of_unknown_user(store, user)
    choice, page = Choice(user=user, label=_pair(label)), Page(limit=limit, after=after)
    if sweep_id is not None:
        _sweep(store, sweep_id, watch=watch, as_json=as_json)
    elif job is not None:
        _job(store, job_named(store, job), full=full, watch=watch, as_json=as_json)
    elif everything:
        from .overview import job_list
        from .overview_text import job_list_text

        answer = job_list(store, choice, page)
        output.show_page(answer, as_json, lambda: job_list_text(answer, detect_screen()))
    else:
        _overview(settings, store, choice, page, watch=watch, as_json=as_json)


def _pair(label: str | None) -> tuple[str, str] | None:
    """The key and value of --label. Raises UsageError."""
    if label is None:
        return None
    key, equals, value = label.partition("=")
    if not equals:
        raise UsageError(f"--label {label} is not of the form KEY=VALUE", "like --label project=support")
    return key, value


def _job(store: Store, job_id: int, *, full: bool, watch: bool, as_json: bool) -> None:
    from .job import job_in_full
    from .job_text import job_text

    if watch:
        from .follow import follow

        sys.exit(follow(store, job_id))
    answer = job_in_full(store, job_id)
    output.show(answer, as_json, lambda: job_text(answer, detect_screen(), full=full))


def _overview(settings: Settings, store: Store, choice: Choice, page: Page, *, watch: bool, as_json: bool) -> None:
    from .overview import Overview, overview, told_of_queue
    from .overview_text import overview_text

    def look() -> Overview:
        return told_of_queue(overview(store, choice, page, alone=not as_json), settings)

    if watch:
        redraw(lambda: (overview_text(look(), detect_screen()), True))
    answer, screen = look(), detect_screen()
    limit = click.get_current_context().get_parameter_source("limit")
    if limit is not click.core.ParameterSource.DEFAULT:  # for what a person has asked no terminal is too small
        screen = replace(screen, height=None)
    output.show_page(answer, as_json, lambda: overview_text(answer, screen))


def _sweep(store: Store, sweep_id: int, *, watch: bool, as_json: bool) -> None:
    from .standing import sweep_standing
    from .standing_text import opened

    def frame() -> tuple[str, bool]:
        standing = sweep_standing(store, sweep_id)
        return opened(standing, detect_screen()), not standing.sweep.ended

    if watch:
        redraw(frame)
        return
    answer = sweep_standing(store, sweep_id)
    output.show(answer, as_json, lambda: opened(answer, detect_screen()))


POLL_S = 1.0


@click.command()
@click.argument("job", type=JobName(), metavar="JOB")
@click.option("-f", "--follow", "following", is_flag=True, help="Follow the log until the job has ended.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines, and what follows with -f.")
def logs(job: str, following: bool, tail: int | None) -> None:
    """Print a job's log."""
    from .job import job_log, log_since

    settings, store = open_session()
    job_id = job_named(store, job)
    log = job_log(store, lambda: open_artifacts(settings, store), job_id)
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
