"""Commands that read the jobs: status, show, logs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loractl.common.errors import ExitCode
from loractl.common.text import clean_line
from loractl.scheduler.text import jobs as render

if TYPE_CHECKING:
    from loractl.common.settings import Settings
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job
    from loractl.scheduler.answers.why import Start, Wait

_WATCH_S = 2.0


@click.command()
@click.argument("job_id", required=False, type=int, metavar="[JOB]")
@click.option("-a", "--all", "everything", is_flag=True, help="List ended jobs too.")
@click.option("--watch", is_flag=True, help="Redraw until the job has ended; its outcome is the exit status.")
@click.option("--user", help="Only this person's jobs.")
@click.option("--label", metavar="KEY=VALUE", help="Only jobs with this label.")
@click.option("-n", "--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many with -a.")
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="The members of a sweep.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(
    job_id: int | None,
    everything: bool,
    watch: bool,
    user: str | None,
    label: str | None,
    limit: int,
    sweep_id: int | None,
    as_json: bool,
) -> None:
    """List what runs and what waits, or one job in full.

    Without JOB and -a: running jobs, waiting jobs with the reason, a line a sweep, and how many ended today.
    """
    from loractl.common.errors import UsageError
    from loractl.scheduler.session import open_session

    if sweep_id is not None and (job_id is not None or everything or user or label):
        raise UsageError("--sweep lists the members of one sweep", f"alone: loractl status --sweep {sweep_id}")
    if label is not None and "=" not in label:
        raise UsageError(f"--label {label} is not of the form KEY=VALUE", "like --label project=support")
    _, store = open_session()
    if watch and as_json:
        raise UsageError("--watch draws for people, --json prints once", "leave one of them out")
    if sweep_id is not None:
        _open_sweep(store, sweep_id, watch=watch, as_json=as_json)
        return
    if job_id is not None and watch:
        sys.exit(follow(store, job_id))
    if job_id is not None:
        job = store.job(job_id)
        click.echo(json.dumps(render.job_fields(job)) if as_json else _one(store, job))
        return
    key, _, value = (label or "").partition("=")
    pair = (key, value) if label else None
    if as_json:
        found = store.jobs(user=user, label=pair, limit=limit) if everything else _unfinished(store, user, pair)
        reasons, _ = _waits(store, found)
        rows = [render.job_fields(job) for job in found]
        for row in rows:
            if row["job_id"] in reasons:
                row["message"] = str(reasons[row["job_id"]])
        click.echo(json.dumps(rows))
        return
    if everything:
        found = store.jobs(user=user, label=pair, limit=limit)
        chosen = bool(user or label)
        click.echo(render.all_jobs(found, _waits(store, found)[0], store.now(), render.detect_screen(), chosen=chosen))
        return
    if not watch:
        click.echo(_overview(store, user, pair))
        return
    _require_terminal()
    frame = _Frame()
    while True:
        frame.draw(_overview(store, user, pair))
        time.sleep(_WATCH_S)


def _open_sweep(store: Store, sweep_id: int, *, watch: bool, as_json: bool) -> None:
    from loractl.scheduler.answers.sweep import SweepStanding
    from loractl.scheduler.text import sweep as render_sweep

    view = store.sweep(sweep_id)
    if as_json:
        click.echo(json.dumps(SweepStanding(sweep=view).as_json()))
        return
    if watch:
        _require_terminal()
    frame = _Frame()
    frame.draw(render_sweep.opened(view, render.detect_screen()))
    while watch and not view.ended:
        time.sleep(_WATCH_S)
        view = store.sweep(sweep_id)
        frame.draw(render_sweep.opened(view, render.detect_screen()))


def _require_terminal() -> None:
    from loractl.common.errors import UsageError

    if not sys.stdout.isatty():
        raise UsageError("--watch without a JOB needs a terminal", "loractl status JOB --watch works in a pipe")


@click.command()
@click.argument("job_id", type=int, metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(job_id: int, as_json: bool) -> None:
    """Show a job's history, attempts and resolved spec."""
    import yaml

    from loractl.scheduler.session import open_session

    _, store = open_session()
    job, attempts, events = store.job(job_id), store.attempts(job_id), store.events(job_id)
    if as_json:
        rows = {
            "attempts": [{c.key: getattr(a, c.key) for c in a.__table__.columns if c.key != "token"} for a in attempts],
            "events": [{"at": e.at, "attempt": e.attempt, "kind": e.kind, "text": e.text} for e in events],
        }
        click.echo(
            json.dumps(
                {**render.job_fields(job), "spec": job.spec, "data": job.data, **rows},
                default=lambda value: value.isoformat(),
            )
        )
        return
    spec = yaml.safe_dump(job.spec, sort_keys=False, allow_unicode=True)
    click.echo(render.history(job, attempts, events, spec, store.now(), render.detect_screen()))


@click.command()
@click.argument("job_id", type=int, metavar="JOB")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job has ended.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines, and what follows with -f.")
def logs(job_id: int, following: bool, tail: int | None) -> None:
    """Print a job's log."""
    from loractl.scheduler.session import open_session

    settings, store = open_session()
    job, chunks = store.job(job_id), store.log(job_id)
    text = "".join(chunk.text for chunk in chunks) + _stored_log(settings, job, {chunk.attempt for chunk in chunks})
    _echo_log(text if tail is None else _last_lines(text, tail))
    last = chunks[-1].chunk_id if chunks else 0
    while following and not job.status.is_terminal:
        time.sleep(1)
        job = store.job(job_id)
        for chunk in store.log(job_id, after=last):
            _echo_log(chunk.text)
            text, last = chunk.text, chunk.chunk_id
    if not text:
        gone = job.status == "succeeded" and job.report_uri is None
        why = "was removed with its result" if gone else f"is empty so far ({job.status.value})"
        click.echo(f"The log of job {job_id} {why}.", err=True)


def _stored_log(settings: Settings, job: Job, listed: set[int]) -> str:
    """The log that is stored with a result, where loractl gc has removed its lines from the database."""
    if job.report_uri is None or job.attempt in listed:
        return ""
    from loractl.common.artifacts import attempt_prefix, open_store

    return open_store(settings).read_bytes(attempt_prefix(job.job_id, job.attempt), "log.txt").decode(errors="replace")


def _last_lines(text: str, count: int) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[len(lines) - count :]) if count < len(lines) else text


def _echo_log(text: str) -> None:
    click.echo("\n".join(clean_line(line) for line in text.split("\n")), nl=False)


def follow(store: Store, job_id: int) -> ExitCode:
    """Watch a job to its end: redrawn on a terminal, a line a change elsewhere. Ctrl-C leaves the job alone."""
    from loractl.common.job.status import Status

    tty, said, frame = sys.stdout.isatty(), "", _Frame()
    while True:
        job = store.job(job_id)
        if tty:
            frame.draw(_one(store, job))
        elif (line := _line(job)) != said:
            click.echo(line, err=True)
            said = line
        if job.status.is_terminal or job.held:
            if not tty:
                click.echo(f"Job {job_id} {job.status.value}: {job.message}")
            return ExitCode.OK if job.status is Status.SUCCEEDED else ExitCode.FAILED
        time.sleep(_WATCH_S if tty else 1.0)


class _Frame:
    """Text that is drawn over itself; the last frame stays."""

    def __init__(self) -> None:
        self._lines = 0

    def draw(self, text: str) -> None:
        width = render.detect_screen().width
        back = f"\x1b[{self._lines}A\r\x1b[J" if self._lines else ""
        click.echo(back + text)
        # a line that is wider than the terminal takes several rows
        self._lines = sum(max(1, -(-len(click.unstyle(line)) // width)) for line in text.split("\n"))


def _overview(store: Store, user: str | None, label: tuple[str, str] | None) -> str:
    import datetime as dt

    from loractl.common.job.status import Status

    now = store.now()
    midnight = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0).astimezone(dt.UTC)
    found = _unfinished(store, user, label)
    reasons, starts = _waits(store, found)
    running = [job for job in found if job.status is Status.RUNNING]
    waiting = [job for job in found if job.status is Status.QUEUED]
    ended = store.jobs(ended_since=midnight, user=user, label=label)
    screen, sweeps = render.detect_screen(), _sweeps(store, [*found, *ended])
    return render.overview(running, waiting, reasons, starts, ended, now, screen, sweeps)


def _sweeps(store: Store, jobs: Sequence[Job]) -> list[str]:
    """A line for each sweep that these jobs are members of."""
    from loractl.scheduler.text.sweep import overview

    sweep_ids = {job.sweep_id for job in jobs if job.sweep_id is not None}
    return overview(store.sweeps(sweep_ids), render.detect_screen()) if sweep_ids else []


def _unfinished(store: Store, user: str | None, label: tuple[str, str] | None) -> list[Job]:
    """Running jobs, then waiting ones in the order of trying."""
    from loractl.common.job.status import Status

    running = store.jobs(statuses=[Status.RUNNING], user=user, label=label)[::-1]
    queued = store.jobs(statuses=[Status.QUEUED], user=user, label=label)
    return [*running, *sorted(queued, key=lambda job: (-job.priority, job.job_id))]


def _waits(store: Store, jobs: list[Job]) -> tuple[dict[int, Wait], dict[int, Start]]:
    """For those that wait: why, and when they will start where that is known."""
    from loractl.common.job.status import Status
    from loractl.scheduler.answers.why import REPLAYED_JOBS, expected_starts, explain, with_start

    queued = [job for job in jobs if job.status is Status.QUEUED]
    if not queued:
        return {}, {}
    view = store.fleet()
    ready = store.ready(REPLAYED_JOBS + 1)
    starts = expected_starts(view, ready) if view.running else {}
    return {job.job_id: with_start(explain(job, view), job, view, ready, starts) for job in queued}, starts


def _one(store: Store, job: Job) -> str:
    waits = _waits(store, [job])[0].get(job.job_id)
    losses, evals = store.metrics(job.job_id, "loss"), store.metrics(job.job_id, "eval_loss")
    attempts, events = store.attempts(job.job_id), store.events(job.job_id)
    return render.one_job(job, attempts, events, losses, evals, waits, store.now(), render.detect_screen())


def _line(job: Job) -> str:
    """A job's state in a line that only changes when something happened."""
    place = f" on {clean_line(job.node or '')}, {job.stage.value}" if job.stage else ""
    steps = f", step {job.step} of {job.total_steps}" if job.stage and job.total_steps else ""
    loss = f", loss {job.loss:.2f}" if job.stage and job.loss is not None else ""
    return f"job {job.job_id} {job.status.value}{place}{steps}{loss}"
