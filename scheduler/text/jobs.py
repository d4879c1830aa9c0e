"""How jobs look on a terminal: functions from values to text, and the JSON of a job.

A sentence first, then the table, the next command last and dim.
"""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from loractl.common.job.status import Status
from loractl.common.text import clean_line, number
from loractl.common.units import duration, gib, thousands

from .screen import Screen, bar, clock, fit, sparkline, table

if TYPE_CHECKING:
    from loractl.common.store.tables import Attempt, Event, Job, MetricPoint
    from loractl.scheduler.answers.why import Start, Wait

_WORD_COLORS = {"never": "red", "held": "yellow", "drained": "yellow", "offline": "yellow"}

WAITING_SHOWN = 50
"""Waiting jobs that the overview lists; a person reads no more."""

JSON_FIELDS = (
    "job_id",
    "name",
    "user",
    "status",
    "reason",
    "message",
    "stage",
    "method",
    "base_model",
    "step",
    "total_steps",
    "loss",
    "eta_seconds",
    "node",
    "gpu",
    "attempt",
    "submitted_at",
    "started_at",
    "ended_at",
    "adapter_uri",
    "report_uri",
    "labels",
    "sweep_id",
)
"""The same names as the tables' columns."""


def job_fields(job: Job) -> dict[str, Any]:
    """A job as JSON values, under the tables' own names."""
    values = {name: getattr(job, name) for name in JSON_FIELDS}
    return {name: value.isoformat() if isinstance(value, dt.datetime) else value for name, value in values.items()}


def overview(
    running: Sequence[Job],
    waiting: Sequence[Job],
    reasons: Mapping[int, Wait],
    starts: Mapping[int, Start],
    ended: Sequence[Job],
    now: dt.datetime,
    screen: Screen,
    sweeps: Sequence[str] = (),
) -> str:
    """What runs, what waits and why, `sweeps` in the place of their members, and how many ended today."""
    lines = [screen.style(f"{len(running)} running, {len(waiting)} waiting.", bold=True) + _next_start(starts, now)]
    if not running and not waiting:
        lines[0] += " Submit one: loractl submit job.yaml"
    running = [job for job in running if job.sweep_id is None]
    waiting = [job for job in waiting if job.sweep_id is None]
    if running:
        lines += ["", *_running_table(running, now, screen)]
    if sweeps:
        lines += ["", *sweeps]
    if waiting:
        shown = waiting[:WAITING_SHOWN]
        lines += ["", *_waiting_table(shown, reasons, starts, now, screen)]
        if len(waiting) > len(shown):
            lines.append(screen.dim(f"{thousands(len(waiting) - len(shown))} more wait (loractl status -a -n 1000)."))
    good = sum(job.status is Status.SUCCEEDED for job in ended)
    bad = sum(job.status is Status.FAILED for job in ended)
    marks = ("✓", "✗") if screen.unicode else ("ok", "failed")
    lines += [
        "",
        screen.dim(
            f"Today {good} {marks[0]} {bad} {marks[1]} (loractl status -a).  "
            + (f"Explain a wait: loractl why {waiting[0].job_id}" if waiting else _how_to_open(bool(sweeps)))
        ),
    ]
    return "\n".join(lines)


def _how_to_open(sweep: bool) -> str:
    return "A sweep's jobs: loractl status --sweep SWEEP" if sweep else "One in full: loractl status JOB"


def all_jobs(
    jobs: Sequence[Job],
    waits: Mapping[int, Wait],
    now: dt.datetime,
    screen: Screen,
    *,
    chosen: bool = False,
) -> str:
    """Every job, newest first, with its outcome; `chosen`: a filter left others out."""
    if not jobs:
        return "No job matches." if chosen else "No job yet. Submit one: loractl submit job.yaml"
    wide = screen.width >= 110
    rows = []
    for job in jobs:
        result = job.message or (f"attempt {job.attempt} on {job.node}" if job.status is Status.RUNNING else "")
        if job.status is Status.FAILED and job.reason is not None:
            result = f"{job.reason.value}: {result}"
        if job.job_id in waits:
            result = f"waits: {waits[job.job_id]}"
        row = [str(job.job_id), screen.style(fit(job.name, 24 if wide else 18), bold=True), fit(job.user, 8)]
        row += [job.method or "–"] if wide else []
        rows.append([*row, clock(job.ended_at, now), _state(job, screen), result])
    headers = ["JOB", "NAME", "OWNER", *(["METHOD"] if wide else []), "ENDED", "STATUS", "RESULT"]
    others = sum(max(len(h), *(len(click.unstyle(r[n])) for r in rows)) + 2 for n, h in enumerate(headers[:-1]))
    rows = [[*row[:-1], fit(row[-1], max(20, screen.width - others))] for row in rows]
    done = next((job.job_id for job in jobs if job.status is Status.SUCCEEDED and job.report_uri), None)
    lines = table(headers, rows, screen, right=("JOB", "ENDED"))
    if done is not None:
        lines += ["", screen.dim(f"Its report: loractl report {done}   its adapter: loractl adapters pull {done} DIR")]
    return "\n".join(lines)


def one_job(
    job: Job,
    attempts: Sequence[Attempt],
    events: Sequence[Event],
    losses: Sequence[MetricPoint],
    evals: Sequence[MetricPoint],
    waits: Wait | None,
    now: dt.datetime,
    screen: Screen,
) -> str:
    """One job in full: where it is, its course, its history, and the next command."""
    head = screen.style(f"{job.job_id} {clean_line(job.name)}", bold=True)
    lines = []
    if job.status is Status.RUNNING:
        doing = "stopping" if job.cancel_requested else job.stage.value if job.stage else "starting"
        lines += [f"{head} on {clean_line(job.node or '')}, attempt {job.attempt}, {doing}", ""]
        share = job.step / job.total_steps if job.step is not None and job.total_steps else 0.0
        steps = f"{thousands(job.step)} of {thousands(job.total_steps)}" if job.total_steps else "loading"
        eta = f"  {duration(job.eta_seconds)} left" if job.eta_seconds else ""
        tail = f" {share:4.0%}  {steps}{eta}"
        lines += [bar(share, min(60, screen.width - len(tail)), screen) + tail, ""]
    elif job.status is Status.QUEUED and waits is not None:
        lines += [f"{head} waits: {waits.word}, {clean_line(waits.sentence)}.", ""]
    else:
        reason = f" ({job.reason.value})" if job.status is Status.FAILED and job.reason else ""
        lines += [f"{head} {_state(job, screen)}{reason}: {clean_line(job.message or '')}", ""]
    if losses:
        held = f"   held out {evals[-1].value:.2f} at step {thousands(evals[-1].step)}" if evals else ""
        lines.append(f"loss    {sparkline([p.value for p in losses], 30, screen)}  {losses[-1].value:.2f}{held}")
    if attempts:
        last = attempts[-1]
        speed = f"   speed {job.tokens_per_second:.0f} tok/s" if job.tokens_per_second else ""
        planned = f"planned {gib(last.vram_planned)} GiB" if last.vram_planned else ""
        peak = f"{gib(last.vram_peak)} GiB at most" if last.vram_peak else ""
        memory = ", ".join(part for part in (peak, planned) if part)
        lines.append((f"memory  {memory}   " if memory else "") + f"method {last.method}{speed}")
    if job.adapter_uri:
        lines += [f"adapter {clean_line(job.adapter_uri)}", f"report  {clean_line(job.report_uri or '')}"]
    if lines[-1]:
        lines.append("")
    lines += [f"{clock(event.at, now)}  {clean_line(event.text)}" for event in reversed(events[-12:])]
    lines += ["", screen.dim(_next_command(job))]
    return "\n".join(lines)


def history(
    job: Job, attempts: Sequence[Attempt], events: Sequence[Event], spec: str, now: dt.datetime, screen: Screen
) -> str:
    """The whole history, the attempts, and the spec as it was resolved."""
    head = screen.style(f"{job.job_id} {clean_line(job.name)}", bold=True)
    lines = [f"{head} by {clean_line(job.user)}: {_state(job, screen)}", ""]
    lines += [f"{clock(event.at, now):>9}  {clean_line(event.text)}" for event in events]
    if attempts:
        rows = [
            [
                str(a.attempt),
                clean_line(a.node),
                a.method,
                gib(a.vram_planned),
                gib(a.vram_peak),
                clock(a.started_at, now),
                duration((a.ended_at - a.started_at).total_seconds()) if a.ended_at else "runs",
                a.reason.value if a.reason else "",
                f"step {a.resumed_from_step}" if a.resumed_from_step else "",
            ]
            for a in attempts
        ]
        headers = ["ATTEMPT", "CARD", "METHOD", "PLAN GiB", "PEAK GiB", "STARTED", "TOOK", "ENDED AS", "RESUMED FROM"]
        lines += ["", *table(headers, rows, screen, right=("ATTEMPT", "PLAN GiB", "PEAK GiB"))]
    return "\n".join([*lines, "", screen.dim("spec:"), *map(clean_line, spec.rstrip().split("\n"))])


def _running_table(running: Sequence[Job], now: dt.datetime, screen: Screen) -> list[str]:
    wide = screen.width >= 110
    rows = []
    for job in running:
        share = job.step / job.total_steps if job.step is not None and job.total_steps else None
        progress = bar(share or 0.0, 12 if wide else 10, screen) + (f" {share:4.0%}" if share is not None else "   – ")
        training = job.stage is not None and job.stage.value == "training"
        done = (
            clock(now + dt.timedelta(seconds=job.eta_seconds), now)
            if training and job.eta_seconds
            else (job.stage.value if job.stage else "–")
        )
        row = [
            str(job.job_id),
            screen.style(fit(job.name, 16 if wide else 14), bold=True),
            fit(job.user, 8),
            fit(job.node or "–", 14 if wide else 12),
            screen.style(progress, fg="blue"),
            done,
            number(job.loss, 2),
        ]
        if wide:
            row.append(f"{fit(job.base_model.rpartition('/')[2], screen.width - 94)} {job.method}")
        rows.append(row)
    headers = ["JOB", "NAME", "OWNER", "CARD", "PROGRESS", "DONE AT", "LOSS", *(["MODEL"] if wide else [])]
    return table(headers, rows, screen, right=("JOB", "LOSS"))


def _next_start(starts: Mapping[int, Start], now: dt.datetime) -> str:
    """Which waiting job starts first, where that is known."""
    coming = [(start.at, job_id, start.node) for job_id, start in starts.items() if start.at > now]
    if not coming:
        return ""
    at, job_id, node = min(coming)
    return f" Next: {job_id} on {node} at about {clock(at, now)}."


def _waiting_table(
    waiting: Sequence[Job],
    reasons: Mapping[int, Wait],
    starts: Mapping[int, Start],
    now: dt.datetime,
    screen: Screen,
) -> list[str]:
    """The reason is never cut: on a narrow screen it goes over several lines."""
    whens = [_start(reasons[job.job_id], starts.get(job.job_id), now) for job in waiting]
    rows = [
        [
            str(job.job_id),
            screen.style(fit(job.name, 16 if screen.width < 110 else 24), bold=True),
            fit(job.user, 8),
            gib(job.vram_needed),
            screen.style(f"{reasons[job.job_id].word:<8}", fg=_WORD_COLORS.get(reasons[job.job_id].word)),
        ]
        for job in waiting
    ]
    header, *lines = table(["JOB", "NAME", "OWNER", "GiB", "WAITS FOR"], rows, screen, right=("JOB", "GiB"))
    before = max(len(click.unstyle(line)) for line in [header, *lines]) + 1
    last = max(5, *map(len, whens))
    room = max(20, screen.width - before - last - 2)
    told = [screen.dim(f"{click.unstyle(header):<{before + room}}  {'START':>{last}}")]
    for line, job, when in zip(lines, waiting, whens, strict=True):
        first, *rest = textwrap.wrap(clean_line(reasons[job.job_id].sentence), room) or [""]
        gap = " " * (before - len(click.unstyle(line)))
        told.append(f"{line}{gap}{first:<{room}}  {when:>{last}}")
        told += [" " * before + part for part in rest]
    return told


def _start(wait: Wait, start: Start | None, now: dt.datetime) -> str:
    if wait.word == "never":
        return "never"
    if wait.word == "next":
        return "now"
    return "–" if start is None else clock(start.at, now)


def _state(job: Job, screen: Screen) -> str:
    color = {Status.SUCCEEDED: "green", Status.FAILED: "red", Status.RUNNING: "blue"}.get(job.status)
    return screen.style("held" if job.held else job.status.value, fg=color)


def _next_command(job: Job) -> str:
    if job.status is Status.SUCCEEDED and job.report_uri is None:
        return f"Its result was removed: loractl show {job.job_id} says who and when"
    if job.status is Status.SUCCEEDED:
        return f"Its report: loractl report {job.job_id}   its adapter: loractl adapters pull {job.job_id} DIR"
    if job.status in (Status.FAILED, Status.CANCELLED):
        from loractl.common.job.status import OUTCOMES

        advice = OUTCOMES[job.reason].advice.replace("JOB", str(job.job_id)) if job.reason else ""
        return f"Next: {advice}." if advice else f"Its log: loractl logs {job.job_id}"
    if job.status is Status.RUNNING and job.cancel_requested:
        return f"A cancel was asked for. Its log: loractl logs {job.job_id} -f"
    if job.status is Status.RUNNING:
        return f"Its log: loractl logs {job.job_id} -f   stop it: loractl cancel {job.job_id}"
    return f"Explain the wait: loractl why {job.job_id}   drop it: loractl cancel {job.job_id}"
