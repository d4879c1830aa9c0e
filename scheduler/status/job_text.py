"""One job on a terminal: its state, its course, its attempts and its history."""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Sequence

import click

from loractl.common.job.status import OUTCOMES, Stage, Status
from loractl.common.text import clean_line
from loractl.common.units import clock, duration, gib, thousands
from loractl.scheduler.cli.screen import Screen, bar, sparkline, table, wrapped

from .job import JobInFull, JobState, PastAttempt

LAST_EVENTS = 12


def job_text(answer: JobInFull, screen: Screen, *, full: bool = False) -> str:
    """One job: where it is, its course, its last events, and the next command. `full`: each attempt, all events, and
    the spec as it was resolved."""
    job = answer.job
    lines = [*_standing(answer, screen), ""]
    lines += [_course("loss", answer.losses, screen)] if answer.losses else []
    lines += [_course("held out", answer.held_out, screen)] if answer.held_out else []
    if answer.attempts:
        lines += _memory(answer.attempts[-1], job, screen)
    if job.adapter_uri:
        lines += [f"adapter   {clean_line(job.adapter_uri)}", f"report    {clean_line(job.report_uri or '')}"]
    lines += _chain(answer)
    if lines[-1]:
        lines.append("")
    if full and answer.attempts:
        lines += [*_attempts_table(answer, screen), ""]
    for event in reversed(answer.events if full else answer.events[-LAST_EVENTS:]):
        lines += _told(f"{clock(event.at, answer.now):>9}" if full else clock(event.at, answer.now), event.text, screen)
    older = len(answer.events) - LAST_EVENTS
    if older > 0 and not full:
        lines.append(screen.dim(f"{older} older: loractl status {job.job_id} --full"))
    if full:
        import yaml

        spec = yaml.safe_dump(dict(answer.spec), sort_keys=False, allow_unicode=True)
        lines += ["", screen.dim("spec:"), *map(clean_line, spec.rstrip().split("\n"))]
    return "\n".join([*lines, "", screen.dim(_next_command(job))])


def _chain(answer: JobInFull) -> list[str]:
    """The jobs before it and behind it."""
    lines = []
    if answer.after:
        before = ", ".join(f"{job.job_id} {clean_line(job.name)} ({job.status.value})" for job in answer.after)
        lines.append(f"after     {before}")
    if answer.followers:
        lines.append(f"then      {', '.join(map(str, answer.followers))}")
    return lines


def _told(when: str, text: str, screen: Screen) -> list[str]:
    """A line of the history. A terminal wraps it between words; a pipe gets it whole, for searching."""
    line = f"{when}  {clean_line(text)}"
    if screen.height is None:
        return [line]
    return textwrap.wrap(line, screen.width, subsequent_indent=" " * (len(when) + 2), break_on_hyphens=False)


def _sentence(job: JobState, rest: str, screen: Screen) -> list[str]:
    """The job's name, and a text about it, wrapped like the history."""
    name, rest = f"{job.job_id} {clean_line(job.name)}", clean_line(rest)
    if screen.height is None:
        return [screen.style(name, bold=True) + rest]
    return wrapped(name + rest, name, screen)


def _course(name: str, points: Sequence[tuple[int, float]], screen: Screen) -> str:
    """A loss over the steps, and its last value."""
    step, loss = points[-1]
    drawn = sparkline([value for _, value in points], 30, screen)
    return f"{name:<8}  {drawn}{'  ' * bool(drawn)}{loss:.2f} at step {thousands(step)}"


def _memory(last: PastAttempt, job: JobState, screen: Screen) -> list[str]:
    """The last attempt's peak and plan, its method and speed. On a CPU both cover all that the process holds, libraries
    included."""
    several = len(last.cards) > 1
    how = f"method {last.how}"
    how += f"   speed {job.tokens_per_second:.0f} tok/s" if job.tokens_per_second else ""
    of_ram = " of RAM" if last.row.device_kind == "cpu" else ""
    peak = f"{gib(last.peak)} GiB{of_ram} at most{' on one card' if several else ''}" if last.peak else ""
    planned = f"planned {gib(last.planned)} GiB{' on each' if several else ''}" if last.planned else ""
    memory = ", ".join(part for part in (peak, planned) if part)
    line = (f"memory    {memory}   " if memory else "") + how
    lines = [line] if not several or len(line) <= screen.width else [f"memory    {memory}", f"          {how}"]
    held = [f"{clean_line(part.node)} {gib(part.used)}" for part in last.cards if part.used and several]
    now = textwrap.wrap(f"now {', '.join(held)}", screen.width - 10) if held else []
    return [*lines, *(f"          {part}" for part in now)]


def _standing(answer: JobInFull, screen: Screen) -> list[str]:
    """Where the job is, and its progress."""
    job = answer.job
    if job.status is Status.RUNNING:
        yields = "" if job.preempted_by is None else f"giving way to job {job.preempted_by}"
        doing = "stopping" if job.cancel_requested else yields or (job.stage.value if job.stage else "starting")
        share = job.share or 0.0
        steps = f"{thousands(job.step)} of {thousands(job.total_steps)}" if job.total_steps else "loading"
        if job.stage is Stage.EVALUATING and job.to_evaluate:
            steps = f"{thousands(job.evaluated)} of {thousands(job.to_evaluate)} rows and answers"
        eta = f"  {duration(job.eta_seconds)} left" if job.eta_seconds and not job.cancel_requested else ""
        tail = f" {share:4.0%}  {steps}{eta}"
        trouble = f"; its card is {clean_line(answer.trouble)}" if answer.trouble else ""
        where = f" on {job.where}, attempt {job.attempt}, {doing}{trouble}"
        return [*_sentence(job, where, screen), "", bar(share, min(60, screen.width - len(tail)), screen) + tail]
    if job.status is Status.QUEUED and answer.wait is not None:
        stopped = f" {job.gave_way}." if job.gave_way else ""
        return _sentence(job, f" waits: {answer.wait.word}, {answer.wait.sentence}.{stopped}", screen)
    reason = f" ({job.reason.value})" if job.status is Status.FAILED and job.reason else ""
    name, state = f"{job.job_id} {clean_line(job.name)}", state_word(job, screen)
    return [f"{screen.style(name, bold=True)} {state}{reason}: {clean_line(job.message or '')}"]


def state_line(job: JobState, held_out: Sequence[tuple[int, float]] = ()) -> str:
    """A job's state in a line that only changes when something happened. `held_out`: steps and losses so far."""
    place = f" on {clean_line(job.where)}, {job.stage.value}" if job.stage else ""
    steps = f", step {job.step} of {job.total_steps}" if job.stage and job.total_steps else ""
    loss = f", loss {job.loss:.2f}" if job.stage and job.loss is not None else ""
    held = f", held out {held_out[-1][1]:.2f} at step {held_out[-1][0]}" if job.stage and held_out else ""
    return f"job {job.job_id} {job.status.value}{place}{steps}{loss}{held}"


def _attempts_table(answer: JobInFull, screen: Screen) -> list[str]:
    rows = [_attempt_row(attempt, answer.now) for attempt in answer.attempts]
    headers = ["ATTEMPT", "CARD", "METHOD", "PLAN GiB", "PEAK GiB", "STARTED", "TOOK", "ENDED AS", "RESUMED FROM"]
    lines = table(headers, rows, screen, right=("ATTEMPT", "PLAN GiB", "PEAK GiB"))
    if max(len(click.unstyle(line)) for line in lines) > screen.width:
        headers = ["#", "CARD", "HOW", "PLAN", "PEAK", "AT", "TOOK", "ENDED AS", "FROM"]
        lines = table(headers, rows, screen, right=("#", "PLAN", "PEAK"))
    note = "GiB: of several cards the plan of each, and the peak of the fullest."
    return [*lines, screen.dim(note)] if answer.had_several else lines


def _attempt_row(attempt: PastAttempt, now: dt.datetime) -> list[str]:
    took = (attempt.row.ended_at - attempt.row.started_at).total_seconds() if attempt.row.ended_at else None
    return [
        str(attempt.row.attempt),
        clean_line(attempt.place),
        attempt.how,
        gib(attempt.planned),
        gib(attempt.peak),
        clock(attempt.row.started_at, now),
        "runs" if took is None else duration(took if took >= 0 else None),  # below: the clock was set back
        attempt.row.reason.value if attempt.row.reason else "",
        f"step {attempt.row.resumed_from_step}" if attempt.row.resumed_from_step else "",
    ]


def state_word(job: JobState, screen: Screen) -> str:
    """Its status as a coloured word."""
    color = {Status.SUCCEEDED: "green", Status.FAILED: "red", Status.RUNNING: "blue"}.get(job.status)
    return screen.style("held" if job.held and job.status is Status.QUEUED else job.status.value, fg=color)


def _next_command(job: JobState) -> str:
    if job.status is Status.SUCCEEDED and job.report_uri is None:
        return "Its result was removed; its history says who and when"
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
    if job.held:
        return f"Release it: loractl release {job.job_id}   drop it: loractl cancel {job.job_id}"
    return f"Explain the wait: loractl why {job.job_id}   drop it: loractl cancel {job.job_id}"
