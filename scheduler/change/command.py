"""loractl edit, retry, hold, release and cancel: change existing jobs; of several, those that can be changed are."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from loractl.common.errors import (
    ArtifactError,
    DataError,
    ExitCode,
    JobNotFound,
    LoractlError,
    NotYours,
    SpecError,
    UsageError,
    WrongState,
)
from loractl.common.job.status import Stage, Status
from loractl.common.text import clean_line
from loractl.scheduler.cli.named import JobName, Setting, jobs_named, warn_of_unknown_user
from loractl.scheduler.cli.output import hint, warn
from loractl.scheduler.cli.session import open_artifacts, open_session

if TYPE_CHECKING:
    from loractl.common.store.store import Store

AT_ONCE = 100
"""Jobs that one transaction cancels: a commit costs more than a change, and workers wait for what is changed."""


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JobName(), metavar="JOB...")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    required=True,
    type=Setting(),
    metavar="KEY=VALUE",
    help="A key's new value, like priority=5.",
)
def edit(jobs: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Change the settings of a waiting or running job.

    Before a job begins all may change but its base and its data; while it runs priority, labels and
    resources.time_limit. A job that has begun and waits again takes what leaves its checkpoint valid.
    """
    _change(jobs, overrides, again=False)


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JobName(), metavar="JOB...")
@click.option(
    "--set", "overrides", multiple=True, type=Setting(), metavar="KEY=VALUE",
    help="A key's new value, like resources.time_limit=2h; only keys that leave the checkpoint valid.",
)  # fmt: skip
def retry(jobs: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Queue failed or cancelled jobs again.

    They continue from their checkpoints, if they have any. A held job has not ended: loractl release lets it start.
    """
    _change(jobs, overrides, again=True)


def _change(jobs: Sequence[str], overrides: Sequence[str], *, again: bool) -> None:
    """Give jobs the settings. `again`: queue them, with or without a change; else none of them has ended."""
    from loractl.common.queue.hints import open_sender
    from loractl.scheduler.submit.intake import wake_for

    from .amendment import NoChange, amendment, require_unended, unchecked_rows, unknown_channels

    settings, store = open_session()
    artifacts = functools.partial(open_artifacts, settings, store)
    with open_sender(settings) as sender:

        def change(job_id: int) -> None:
            if not again:
                require_unended(store, job_id)
            changed = None
            try:
                changed = amendment(store, job_id, overrides) if overrides else None
            except NoChange:
                if not again:
                    raise
            if changed is not None:
                warn(unknown_channels(changed, settings))
                warn(unchecked_rows(changed, artifacts, lambda: hint("Counting tokens ...")))
            told = f": {changed.text}" if changed else ""
            if again:
                job = store.jobs.retry(job_id, settings.user, changed)
                click.echo(f"Job {job_id} is queued again{told}.")
            else:
                assert changed is not None, "--set is required"
                job = store.jobs.edit(changed, settings.user)
                click.echo(f"Job {job_id} is changed{told}.")
            warn(wake_for(job, sender))

        _for_each(jobs_named(store, jobs), change)


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JobName(), metavar="JOB...")
@click.option("--reason", default="", metavar="TEXT", help="The reason, which status shows to others.")
def hold(jobs: tuple[str, ...], reason: str) -> None:
    """Keep waiting jobs from starting until loractl release."""
    settings, store = open_session()

    def keep(job_id: int) -> None:
        store.jobs.hold(job_id, settings.user, " ".join(reason.split()))
        click.echo(f"Job {job_id} is held; loractl release {job_id} lets it start.")

    _for_each(jobs_named(store, jobs), keep)


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JobName(), metavar="JOB...")
def release(jobs: tuple[str, ...]) -> None:
    """Let held jobs start."""
    from loractl.common.queue.hints import open_sender
    from loractl.scheduler.submit.intake import wake_for

    settings, store = open_session()
    with open_sender(settings) as sender:

        def start(job_id: int) -> None:
            job = store.jobs.release(job_id, settings.user)
            click.echo(f"Job {job_id} is released.")
            warn(wake_for(job, sender))

        _for_each(jobs_named(store, jobs), start)


@click.command()
@click.argument("jobs", nargs=-1, type=JobName(), metavar="JOB...")
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="All members of a sweep that have not ended.")
@click.option("--user", help="All of this person's jobs that have not ended; me is yourself.")
@click.option("--queued", is_flag=True, help="With --user: only those that wait.")
@click.option("--with-followers", is_flag=True, help="Also the jobs that wait for these.")
def cancel(jobs: tuple[str, ...], sweep_id: int | None, user: str | None, queued: bool, with_followers: bool) -> None:
    """Cancel waiting or running jobs.

    JOB is a number, a range like 3-9, the name of one job, or name:tag.

    A waiting job ends at once; a running one stops at its next step, at the latest after 15 s. Its checkpoints are
    removed. Of several jobs, those that can't be cancelled are named, and the others are.
    """
    if [bool(jobs), sweep_id is not None, user is not None].count(True) != 1 or (queued and user is None):
        example = "like loractl cancel 12, loractl cancel --sweep 3, or loractl cancel --user me --queued"
        raise UsageError("cancel takes jobs, or a sweep, or a person's jobs", example)
    settings, store = open_session()
    job_ids = jobs_named(store, jobs)
    if user is not None:
        user = settings.user if user == "me" else user
        statuses = (Status.QUEUED,) if queued else (Status.QUEUED, Status.RUNNING)
        job_ids = sorted(job.job_id for job in store.jobs.matching(statuses=statuses, user=user))
        if not job_ids:
            warn_of_unknown_user(store, user)
            click.echo("No such job waits." if queued else "No such job waits or runs.")

    cancelled = functools.partial(store.jobs.cancel_open, user=settings.user, waiting=queued)
    tried: set[int] = set()
    became: dict[int, Status] = {}

    def end(job_id: int) -> None:
        if job_id not in tried and len(job_ids) > 1:
            some = job_ids[(first := job_ids.index(job_id)) : first + AT_ONCE]
            tried.update(some)
            with contextlib.suppress(JobNotFound, NotYours, WrongState):  # below, each is asked for and told alone
                became.update((job.job_id, job.status) for job in cancelled(some))
        _tell(store, job_id, became.get(job_id) or store.jobs.cancel(job_id, settings.user, waiting=queued).status)

    if with_followers:  # the last first, so that none starts in between
        members = [] if sweep_id is None else [member.job_id for member in store.sweeps.get(sweep_id).members]
        named = {*job_ids, *members}
        job_ids = [*reversed(store.jobs.followers(*named)), *job_ids]
    refused = None
    try:
        _for_each(job_ids, end)
    except (click.exceptions.Exit, WrongState, JobNotFound, NotYours) as error:  # a follower has ended meanwhile
        refused = error
    for job in [] if sweep_id is None else store.sweeps.cancel(sweep_id, settings.user):
        _tell(store, job.job_id, job.status)
    if refused is not None:
        raise refused


def _tell(store: Store, job_id: int, became: Status) -> None:
    from loractl.scheduler.status.job import job_state

    if became is Status.CANCELLED:
        click.echo(f"Job {job_id} is cancelled.")
        return
    job = job_state(store, job_id)
    if job.status is not Status.RUNNING:  # it ended before its trainer could be asked to stop
        click.echo(f"Job {job_id} {job.status.in_words}.")
        return
    if job.stage is Stage.STORING:
        says = "has ended its training: it succeeds once its result is stored, unless the artifact store is away"
        click.echo(f"Job {job_id} {says}.")
        return
    kept = f"nothing of its training is kept, so loractl retry {job_id} would start again"
    click.echo(f"Job {job_id} is being stopped on {clean_line(job.where)}; {kept}.")


_OF_ONE_JOB = (JobNotFound, NotYours, WrongState, UsageError, SpecError, DataError, ArtifactError)
"""What keeps one of several jobs as it is: the others may still take the change."""


def _for_each(job_ids: Sequence[int], do: Callable[[int], None]) -> None:
    """Do it for each job. Of several, those that fail are named and the others done; the exit status is then 1.

    Raises the error of a job that was named alone.
    """
    refused = False
    for job_id in dict.fromkeys(job_ids):
        try:
            do(job_id)
        except _OF_ONE_JOB as error:
            if len(job_ids) == 1:
                raise
            refused = True
            click.echo(f"Error: {_naming(job_id, error)}", err=True)
    if refused:
        raise click.exceptions.Exit(ExitCode.FAILED)


def _naming(job_id: int, error: LoractlError) -> str:
    """The error in a line that names the job."""
    said = error.sentence
    if isinstance(error, SpecError):  # a slip in --set is told to each job: only its hint says what was meant
        said = "; ".join(f"{each} ({each.hint})" if each.hint else str(each) for each in error.problems)
    return said if re.search(rf"\bjob {job_id}\b", said) else f"job {job_id}: {said}"
