"""loractl status: what runs and what waits, one job in full, or the members of a sweep."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from loractl.common.errors import UsageError
from loractl.scheduler.text.screen import detect_screen

from .named import JobName, job_named
from .output import paged, show, show_page

if TYPE_CHECKING:
    from loractl.common.settings import Settings
    from loractl.common.store.records import Choice, Page
    from loractl.common.store.store import Store


@click.command()
@click.argument("job", required=False, type=JobName(), metavar="[JOB]")
@click.option("-a", "--all", "everything", is_flag=True, help="List ended jobs too.")
@click.option("--watch", is_flag=True, help="Redraw until the job has ended; its outcome is the exit status.")
@click.option("--user", help="Only this person's jobs; me is yourself.")
@click.option("--label", metavar="KEY=VALUE", help="Only jobs with this label.")
@paged("jobs that wait, or of all with -a")
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="The members of a sweep.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(
    job: str | None,
    everything: bool,
    watch: bool,
    user: str | None,
    label: str | None,
    limit: int,
    after: int | None,
    sweep_id: int | None,
    as_json: bool,
) -> None:
    """List running and waiting jobs, or show one job in full.

    Without JOB and -a: running jobs, waiting jobs with the reason, a line a sweep, and how many ended today.
    """
    from loractl.common.store.records import Choice, Page
    from loractl.scheduler.session import open_session

    if watch and as_json:
        raise UsageError("--watch draws for people, --json prints once", "leave one of them out")
    if sweep_id is not None and (job is not None or everything or user or label or after):
        raise UsageError("--sweep lists the members of one sweep", f"alone: loractl status --sweep {sweep_id}")
    settings, store = open_session()
    user = settings.user if user == "me" else user
    choice, page = Choice(user=user, label=_pair(label)), Page(limit=limit, after=after)
    if sweep_id is not None:
        _sweep(store, sweep_id, watch=watch, as_json=as_json)
    elif job is not None:
        _job(store, job_named(store, job), watch=watch, as_json=as_json)
    elif everything:
        _all(store, choice, page, as_json=as_json)
    else:
        _overview(settings, store, choice, page, watch=watch, as_json=as_json)


def _pair(label: str | None) -> tuple[str, str] | None:
    """The key and the value of --label. Raises UsageError."""
    if label is None:
        return None
    key, equals, value = label.partition("=")
    if not equals:
        raise UsageError(f"--label {label} is not of the form KEY=VALUE", "like --label project=support")
    return key, value


def _job(store: Store, job_id: int, *, watch: bool, as_json: bool) -> None:
    from loractl.scheduler.answers.job import job_in_full
    from loractl.scheduler.text.history import job_text

    if watch:
        from .follow import follow

        sys.exit(follow(store, job_id))
    answer = job_in_full(store, job_id)
    show(answer, as_json, lambda: job_text(answer, detect_screen()))


def _all(store: Store, choice: Choice, page: Page, *, as_json: bool) -> None:
    from loractl.scheduler.answers.overview import job_list
    from loractl.scheduler.text.jobs import job_list_text

    answer = job_list(store, choice, page)
    show_page(answer, as_json, lambda: job_list_text(answer, detect_screen()))


def _overview(settings: Settings, store: Store, choice: Choice, page: Page, *, watch: bool, as_json: bool) -> None:
    from loractl.scheduler.answers.overview import Overview, overview, told_of_queue
    from loractl.scheduler.text.jobs import overview_text
    from loractl.scheduler.text.live import redraw

    def look() -> Overview:
        return told_of_queue(overview(store, choice, page, alone=not as_json), settings)

    if watch:
        redraw(lambda: (overview_text(look(), detect_screen()), True))
    answer, screen = look(), detect_screen()
    if _asked_for(click.get_current_context()):
        screen = replace(screen, height=None)
    show_page(answer, as_json, lambda: overview_text(answer, screen))


def _asked_for(context: click.Context) -> bool:
    """Whether a person has said how many jobs are wanted: then no terminal is too small for them."""
    return context.get_parameter_source("limit") is not click.core.ParameterSource.DEFAULT


def _sweep(store: Store, sweep_id: int, *, watch: bool, as_json: bool) -> None:
    from loractl.scheduler.answers.sweep import sweep_standing
    from loractl.scheduler.text.live import redraw
    from loractl.scheduler.text.sweep import opened

    def frame() -> tuple[str, bool]:
        standing = sweep_standing(store, sweep_id)
        return opened(standing, detect_screen()), not standing.sweep.ended

    if watch:
        redraw(frame)
        return
    answer = sweep_standing(store, sweep_id)
    show(answer, as_json, lambda: opened(answer, detect_screen()))
