"""How jobs look on a terminal: the overview, the list, one in full, and its history.

A sentence first, then the table, the next command last and dim.
"""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from loractl.common.job.status import OUTCOMES, Stage, Status
from loractl.common.text import clean_line, number
from loractl.common.units import clock, duration, gib, thousands
from loractl.scheduler.answers.wait.cards import beside

from .screen import Screen, bar, fit, sparkline, table, wrapped, wrapped_table
from .sweep import overview as sweep_lines

if TYPE_CHECKING:
    from loractl.scheduler.answers.job import JobHistory, JobInFull, JobState, PastAttempt
    from loractl.scheduler.answers.overview import JobList, Overview
    from loractl.scheduler.answers.wait.queue import WaitingJobs
    from loractl.scheduler.answers.wait.reasons import Wait

_WORD_COLORS = {"never": "red", "held": "yellow", "drained": "yellow", "closed": "yellow", "offline": "yellow"}


def overview_text(overview: Overview, screen: Screen) -> str:
    """What runs, what waits and why, sweeps in the place of their members, and how many ended today."""
    sentence = f"{overview.sentence}."
    advice = "" if overview.running_count or overview.waiting_count else " Submit one: loractl submit job.yaml"
    head = wrapped(sentence + _next_start(overview) + advice, sentence, screen)
    running = [job for job in overview.running if job.sweep_id is None]
    waiting = [job for job in overview.waiting if job.sweep_id is None]
    older = overview.sweep_count - len(overview.sweeps)
    blocks = [
        _Block.of(_running_table(running, overview, screen)) if running else None,
        _Block.of(sweep_lines(overview.sweeps, screen), older) if overview.sweeps else None,
        _waiting_block(waiting, overview, screen) if waiting else None,
    ]
    lines = head + _in_room([block for block in blocks if block is not None], len(head) + 2, screen)
    next_command = (
        f"Explain a wait: loractl why {waiting[0].job_id}" if waiting
        else "A sweep's jobs: loractl status --sweep SWEEP" if overview.sweeps
        else "One in full: loractl status JOB"
    )  # fmt: skip
    return "\n".join([*lines, "", screen.dim(f"{_today(overview, screen)}  {next_command}")])


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A table of the overview, which a small terminal cuts at a row."""

    header: str
    rows: tuple[tuple[str, ...], ...]  # each of one line or more
    more: int  # rows that are not here
    following: Callable[[int], str]  # the command that goes on behind so many rows

    @classmethod
    def of(cls, lines: Sequence[str], more: int = 0) -> _Block:
        """A table whose rows are known by their lines: what begins with a blank belongs to the row above it."""
        rows: list[tuple[str, ...]] = []
        for line in lines[1:]:
            goes_on = bool(rows) and line.startswith(" " * 20)
            rows = [*rows[:-1], (*rows[-1], line)] if goes_on else [*rows, (line,)]
        return cls(header=lines[0], rows=tuple(rows), more=more, following=lambda shown: "")

    def in_lines(self, room: int | None, screen: Screen) -> list[str]:
        """In so many lines, with how many rows are left out; None: all rows."""
        shown = len(self.rows)
        if room is not None and sum(map(len, self.rows)) + bool(self.more) > room:
            shown, room = 0, room - 1
            while shown < len(self.rows) and (room := room - len(self.rows[shown])) >= 0:
                shown += 1
        left, command = len(self.rows) - shown + self.more, self.following(shown)
        more = [screen.dim(f"+{thousands(left)} more{f': {command}' if command else ''}")] if left else []
        return [self.header, *(line for row in self.rows[:shown] for line in row), *more]


PROMPT_LINES = 2
"""Lines of a terminal that the command and the next prompt take."""


def _in_room(blocks: Sequence[_Block], taken: int, screen: Screen) -> list[str]:
    """The tables below each other. A terminal's lines go to the first ones first; a later one keeps a line a table."""
    lines: list[str] = []
    for place, block in enumerate(blocks):
        room = None
        if screen.height is not None:
            later = 3 * (len(blocks) - place - 1)
            room = max(1, screen.height - PROMPT_LINES - taken - len(lines) - later - 2)
        lines += ["", *block.in_lines(room, screen)]
    return lines


def _today(overview: Overview, screen: Screen) -> str:
    good, bad = (thousands(overview.ended.get(status, 0)) for status in (Status.SUCCEEDED, Status.FAILED))
    marks = ("✓", "✗") if screen.unicode else ("ok", "failed")
    return f"Today {good} {marks[0]} {bad} {marks[1]} (loractl status -a)."


def _more(after: int | None, screen: Screen) -> list[str]:
    return [] if after is None else [screen.dim(f"More: the same command with --after {after}")]


def _next_start(overview: Overview) -> str:
    """Which waiting job starts first, where that is known."""
    if overview.next_start is None:
        return ""
    job_id, start = overview.next_start
    return f" Next: {job_id} on {start.node} at about {clock(start.at, overview.now)}."


def _running_table(running: Sequence[JobState], overview: Overview, screen: Screen) -> list[str]:
    wide, now = screen.width >= 110, overview.now
    rows = []
    for job in running:
        share, length = job.share, 12 if wide else 10
        tail = f" {share:4.0%}" if share is not None else "   – "
        progress = bar(share or 0.0, length, screen) + tail
        if job.stage is Stage.EVALUATING:  # all steps are done: a full bar would say that the job is
            progress = job.stage.value.ljust(length) + (tail if share is not None else " " * len(tail))
        timed = job.stage in (Stage.TRAINING, Stage.EVALUATING)
        trouble = overview.nodes.get(job.node or "")
        done = trouble or (
            clock(now + dt.timedelta(seconds=job.eta_seconds), now)
            if timed and job.eta_seconds
            else (job.stage.value if job.stage else "–")
        )
        row = [
            str(job.job_id),
            screen.style(fit(job.name, 16 if wide else 14), bold=True),
            fit(job.user, 8),
            _place(job, overview.beside.get(job.job_id, 0), 14 if wide else 12),
            screen.style(progress, fg="blue"),
            done,
            number(job.loss, 2),
        ]
        if wide:
            row.append(f"{fit(job.base_model.rpartition('/')[2], screen.width - 94)} {job.method}")
        rows.append(row)
    headers = ["JOB", "NAME", "OWNER", "CARD", "PROGRESS", "DONE AT", "LOSS", *(["MODEL"] if wide else [])]
    return table(headers, rows, screen, right=("JOB", "LOSS"))


def _place(job: JobState, beside: int, width: int) -> str:
    """The card on which a job runs, and how many more it has."""
    more = f" +{beside}" if beside else ""
    return fit(job.node or "–", width - len(more)) + more


def _waiting_block(waiting: Sequence[JobState], overview: Overview, screen: Screen) -> _Block:
    """What waits on this page. The command that goes on names the last job that is shown."""
    header, *rows = _waiting_table(waiting, overview.waits, overview.now, screen)
    members = sum(member.status is Status.QUEUED for view in overview.sweeps for member in view.members)
    left = 0 if overview.after is None else max(1, overview.waiting_count - members - len(waiting))
    return _Block(
        header=header[0],
        rows=tuple(map(tuple, rows)),
        more=left,
        following=lambda shown: f"the same command with --after {waiting[shown - 1].job_id}" if shown else "",
    )


def _waiting_table(
    waiting: Sequence[JobState], waits: WaitingJobs, now: dt.datetime, screen: Screen
) -> list[list[str]]:
    """The lines of the header and of each job. The reason is never cut: on a narrow screen it goes over several lines.

    One that several jobs share is told once.
    """
    whens = [_start(job.job_id, waits, now) for job in waiting]
    words = [waits.reasons[job.job_id].word for job in waiting]
    rows = [
        [
            str(job.job_id),
            screen.style(fit(job.name, 16 if screen.width < 110 else 24), bold=True),
            fit(job.user, 8),
            gib(job.vram_needed),
            screen.style(f"{word:<8}", fg=_WORD_COLORS.get(word)),
        ]
        for job, word in zip(waiting, words, strict=True)
    ]
    header, *lines = table(["JOB", "NAME", "OWNER", "GiB", "WAITS FOR"], rows, screen, right=("JOB", "GiB"))
    before = max(len(click.unstyle(line)) for line in [header, *lines]) + 1
    last = max(5, *map(len, whens))
    room = max(20, screen.width - before - last - 2)
    told = [[screen.dim(f"{click.unstyle(header):<{before + room}}  {'START':>{last}}")]]
    first_with: dict[Wait, int] = {}
    for line, job, when in zip(lines, waiting, whens, strict=True):
        wait = waits.reasons[job.job_id]
        shared = first_with.setdefault(wait, job.job_id)
        sentence = clean_line(wait.sentence) if shared == job.job_id else f"as {shared}"
        first, *rest = textwrap.wrap(sentence, room) or [""]
        gap = " " * (before - len(click.unstyle(line)))
        told.append([f"{line}{gap}{first:<{room}}  {when:>{last}}", *(" " * before + part for part in rest)])
    return told


def _start(job_id: int, waits: WaitingJobs, now: dt.datetime) -> str:
    word, start = waits.reasons[job_id].word, waits.starts.get(job_id)
    if word == "never":
        return "never"
    if word == "next":
        return "now"
    return "–" if start is None else clock(start.at, now)


def job_list_text(answer: JobList, screen: Screen) -> str:
    """Every job, newest first, with its outcome."""
    jobs, wide = answer.jobs, screen.width >= 110
    if not jobs:
        return "No job matches." if answer.chosen else "No job yet. Submit one: loractl submit job.yaml"
    rows = [
        [
            str(job.job_id),
            screen.style(fit(job.name, 24 if wide else 18), bold=True),
            fit(job.user, 8),
            *([job.method or "–"] if wide else []),
            clock(job.ended_at, answer.now),
            _state(job, screen),
            _result(job, answer.waits),
        ]
        for job in jobs
    ]
    headers = ["JOB", "NAME", "OWNER", *(["METHOD"] if wide else []), "ENDED", "STATUS", "RESULT"]
    done = next((job.job_id for job in jobs if job.status is Status.SUCCEEDED and job.report_uri), None)
    lines = wrapped_table(headers, rows, [""] * len(rows), screen, right=("JOB", "ENDED")) + _more(answer.after, screen)
    if done is not None:
        lines += ["", screen.dim(f"Its report: loractl report {done}   its adapter: loractl adapters pull {done} DIR")]
    return "\n".join(lines)


def _result(job: JobState, waits: WaitingJobs) -> str:
    if job.job_id in waits.reasons:
        return f"waits: {waits.reasons[job.job_id]}"
    result = job.message or (f"attempt {job.attempt} on {job.node}" if job.status is Status.RUNNING else "")
    return f"{job.reason.value}: {result}" if job.status is Status.FAILED and job.reason is not None else result


def job_text(answer: JobInFull, screen: Screen) -> str:
    """One job in full: where it is, its course, its history, and the next command."""
    job = answer.job
    lines = [*_standing(answer, screen), ""]
    lines += [_course("loss", answer.losses, screen)] if answer.losses else []
    lines += [_course("held out", answer.held_out, screen)] if answer.held_out else []
    if answer.attempts:
        lines += _memory(answer.attempts[-1], job.tokens_per_second)
    if job.adapter_uri:
        lines += [f"adapter   {clean_line(job.adapter_uri)}", f"report    {clean_line(job.report_uri or '')}"]
    if lines[-1]:
        lines.append("")
    lines += [f"{clock(event.at, answer.now)}  {clean_line(event.text)}" for event in reversed(answer.events[-12:])]
    return "\n".join([*lines, "", screen.dim(_next_command(job))])


def _course(name: str, points: Sequence[tuple[int, float]], screen: Screen) -> str:
    """A loss over the steps, and where it stands."""
    step, loss = points[-1]
    drawn = sparkline([value for _, value in points], 30, screen)
    return f"{name:<8}  {drawn}{'  ' * bool(drawn)}{loss:.2f} at step {thousands(step)}"


def _memory(last: PastAttempt, tokens_per_second: float | None) -> list[str]:
    """The last attempt's peak and plan, its method and speed. On a processor both are of all that the process holds,
    libraries included."""
    how = f"method {last.method}" + (f"   speed {tokens_per_second:.0f} tok/s" if tokens_per_second else "")
    of_ram = " of RAM" if last.device_kind == "cpu" else ""
    peak = f"{gib(last.vram_peak)} GiB{of_ram} at most" if last.vram_peak else ""
    planned = f"planned {gib(last.vram_planned)} GiB" if last.vram_planned else ""
    memory = ", ".join(part for part in (peak, planned) if part)
    return [(f"memory    {memory}   " if memory else "") + how]


def _standing(answer: JobInFull, screen: Screen) -> list[str]:
    """Where the job is, and how far."""
    job = answer.job
    head = screen.style(f"{job.job_id} {clean_line(job.name)}", bold=True)
    if job.status is Status.RUNNING:
        doing = "stopping" if job.cancel_requested else job.stage.value if job.stage else "starting"
        share = job.share or 0.0
        steps = f"{thousands(job.step)} of {thousands(job.total_steps)}" if job.total_steps else "loading"
        if job.stage is Stage.EVALUATING and job.to_evaluate:
            steps = f"{thousands(job.evaluated)} of {thousands(job.to_evaluate)} rows and answers"
        eta = f"  {duration(job.eta_seconds)} left" if job.eta_seconds else ""
        tail = f" {share:4.0%}  {steps}{eta}"
        trouble = f"; its card is {clean_line(answer.trouble)}" if answer.trouble else ""
        shared = f", {beside(answer.companions)}" if answer.companions else ""
        where = f"{head} on {clean_line(job.node or '')}, attempt {job.attempt}, {doing}{shared}{trouble}"
        return [where, "", bar(share, min(60, screen.width - len(tail)), screen) + tail]
    if job.status is Status.QUEUED and answer.wait is not None:
        return [f"{head} waits: {answer.wait.word}, {clean_line(answer.wait.sentence)}."]
    reason = f" ({job.reason.value})" if job.status is Status.FAILED and job.reason else ""
    return [f"{head} {_state(job, screen)}{reason}: {clean_line(job.message or '')}"]


def state_line(job: JobState, held_out: Sequence[tuple[int, float]] = ()) -> str:
    """A job's state in a line that only changes when something happened. `held_out`: steps and losses so far."""
    place = f" on {clean_line(job.node or '')}, {job.stage.value}" if job.stage else ""
    steps = f", step {job.step} of {job.total_steps}" if job.stage and job.total_steps else ""
    loss = f", loss {job.loss:.2f}" if job.stage and job.loss is not None else ""
    held = f", held out {held_out[-1][1]:.2f} at step {held_out[-1][0]}" if job.stage and held_out else ""
    return f"job {job.job_id} {job.status.value}{place}{steps}{loss}{held}"


def history_text(answer: JobHistory, screen: Screen) -> str:
    """The whole history, the attempts, and the spec as it was resolved."""
    import yaml

    job, now = answer.job, answer.now
    head = screen.style(f"{job.job_id} {clean_line(job.name)}", bold=True)
    lines = [f"{head} by {clean_line(job.user)}: {_state(job, screen)}", ""]
    lines += [f"{clock(event.at, now):>9}  {clean_line(event.text)}" for event in answer.events]
    if answer.attempts:
        rows = [_attempt_row(attempt, now) for attempt in answer.attempts]
        headers = ["ATTEMPT", "CARD", "METHOD", "PLAN GiB", "PEAK GiB", "STARTED", "TOOK", "ENDED AS", "RESUMED FROM"]
        lines += ["", *table(headers, rows, screen, right=("ATTEMPT", "PLAN GiB", "PEAK GiB"))]
    spec = yaml.safe_dump(dict(answer.spec), sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, "", screen.dim("spec:"), *map(clean_line, spec.rstrip().split("\n"))])


def _attempt_row(attempt: PastAttempt, now: dt.datetime) -> list[str]:
    took = (attempt.ended_at - attempt.started_at).total_seconds() if attempt.ended_at else None
    return [
        str(attempt.attempt),
        clean_line(attempt.node),
        attempt.method,
        gib(attempt.vram_planned),
        gib(attempt.vram_peak),
        clock(attempt.started_at, now),
        "runs" if took is None else duration(took),
        attempt.reason.value if attempt.reason else "",
        f"step {attempt.resumed_from_step}" if attempt.resumed_from_step else "",
    ]


def _state(job: JobState, screen: Screen) -> str:
    color = {Status.SUCCEEDED: "green", Status.FAILED: "red", Status.RUNNING: "blue"}.get(job.status)
    return screen.style("held" if job.held and job.status is Status.QUEUED else job.status.value, fg=color)


def _next_command(job: JobState) -> str:
    if job.status is Status.SUCCEEDED and job.report_uri is None:
        return f"Its result was removed: loractl show {job.job_id} says who and when"
    if job.status is Status.SUCCEEDED:
        return f"Its report: loractl report {job.job_id}   its adapter: loractl adapters pull {job.job_id} DIR"
    if job.status in (Status.FAILED, Status.CANCELLED):
        known = OUTCOMES.get(job.reason) if job.reason else None  # a newer version has more reasons
        advice = known.next_step(job.job_id, job.has_checkpoint) if known else ""
        return f"Next: {advice}." if advice else f"Its log: loractl logs {job.job_id}"
    if job.status is Status.RUNNING and job.cancel_requested:
        return f"A cancel was asked for. Its log: loractl logs {job.job_id} -f"
    if job.status is Status.RUNNING:
        return f"Its log: loractl logs {job.job_id} -f   stop it: loractl cancel {job.job_id}"
    return f"Explain the wait: loractl why {job.job_id}   drop it: loractl cancel {job.job_id}"
