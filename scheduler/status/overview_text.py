"""Jobs on a terminal: the overview, and the list.

First a sentence, then the table, and last the next command, dim.
"""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from loractl.common.job.status import Stage, Status
from loractl.common.text import clean_line, in_words, number
from loractl.common.units import clock, gib, thousands
from loractl.scheduler.cli.screen import Screen, bar, fit, table, wrapped, wrapped_table
from loractl.scheduler.wait.queue import WaitingJobs

from .job import JobState
from .job_text import state_word
from .overview import JobList, Overview
from .standing_text import overview as sweep_lines

_WORD_COLORS = {"never": "red", "held": "yellow", "drained": "yellow", "closed": "yellow", "offline": "yellow"}


def overview_text(overview: Overview, screen: Screen) -> str:
    """What runs, what waits and why, sweeps in place of their members, and how many ended today."""
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
    rows: tuple[tuple[str, ...], ...]  # each of one or more lines
    more: int  # rows left out
    following: Callable[[int], str]  # the command that continues after this number of rows

    @classmethod
    def of(cls, lines: Sequence[str], more: int = 0) -> _Block:
        """A table whose rows are recognised by their lines: a line that begins with a space belongs to the row above
        it."""
        rows: list[tuple[str, ...]] = []
        for line in lines[1:]:
            goes_on = bool(rows) and line.startswith(" " * 20)
            rows = [*rows[:-1], (*rows[-1], line)] if goes_on else [*rows, (line,)]
        return cls(header=lines[0], rows=tuple(rows), more=more, following=lambda shown: "")

    def in_lines(self, room: int | None, screen: Screen) -> list[str]:
        """The table in at most this many lines, with the number of rows left out; None: all rows."""
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
    """The tables below each other. The first tables get a terminal's lines first; each later one keeps one line."""
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


def _next_start(overview: Overview) -> str:
    """Which waiting job starts first, if known."""
    if overview.next_start is None:
        return ""
    job_id, start = overview.next_start
    return f" Next: {job_id} on {in_words(start.nodes)} at about {clock(start.at, overview.now)}."


def _running_table(running: Sequence[JobState], overview: Overview, screen: Screen) -> list[str]:
    wide, now = screen.width >= 110, overview.now
    headers = ["JOB", "NAME", "OWNER", "CARD", "PROGRESS", "DONE AT", "LOSS", *(["MODEL"] if wide else [])]
    texts = []
    for job in running:
        ends = clock(now + dt.timedelta(seconds=job.eta_seconds), now) if job.eta_seconds else None
        done = overview.trouble_of(job) or ends or (job.stage.value if job.stage else "–")
        texts.append([str(job.job_id), fit(job.user, 8), clean_line(done), number(job.loss, 2)])
    others = sum(max(map(len, column)) for column in zip(["JOB", "OWNER", "DONE AT", "LOSS"], *texts, strict=True))
    widths = _widths(running, screen.width - others - 2 * (len(headers) - 1), wide=wide)
    rows = []
    for job, (number_, user, done, loss) in zip(running, texts, strict=True):
        row = [
            number_,
            screen.style(fit(job.name, widths.name), bold=True),
            user,
            fit(_place(job, widths.card), widths.card),
            screen.style(_progress(job, widths.bar, screen), fg="blue"),
            done,
            loss,
        ]
        if wide:
            row.append(f"{fit(job.base_model.rpartition('/')[2], widths.model)} {job.method}")
        rows.append(row)
    return table(headers, rows, screen, right=("JOB", "LOSS"))


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """Columns of the running table that compete for space."""

    name: int
    card: int
    bar: int
    model: int = 0


def _widths(running: Sequence[JobState], room: int, *, wide: bool) -> _Widths:
    """How the cells share `room` columns: all cards of a job go before a long name, and that before a long bar."""
    whole = max(len(_places(job)[0]) for job in running)
    method = max(len(f" {job.method}") for job in running)
    tries = ((16, 12), (14, 12), (14, 10), (12, 8)) if wide else ((14, 10), (14, 8), (12, 8), (12, 6), (10, 6))
    for name, bar_ in tries:
        left = room - name - bar_ - len(" 100%") - (12 + method if wide else 0)
        if left >= whole:
            break
    name = min(name, max(len("NAME"), *(len(job.name) for job in running)))
    card = max(4, min(whole, left))
    return _Widths(name=name, card=card, bar=bar_, model=max(12, room - name - bar_ - 5 - card - method))


def _progress(job: JobState, length: int, screen: Screen) -> str:
    share = job.share
    tail = f" {share:4.0%}" if share is not None else "   – "
    if job.stage is Stage.EVALUATING:  # all steps are done: a full bar would mean that the job is done
        word = job.stage.value if len(job.stage.value) <= length else "eval"
        return word.ljust(length) + (tail if share is not None else " " * len(tail))
    return bar(share or 0.0, length, screen) + tail


def _place(job: JobState, width: int) -> str:
    """Where a job runs, as fully as the columns allow."""
    return next((text for text in _places(job) if len(text) <= width), _places(job)[-1])


def _places(job: JobState) -> list[str]:
    """The cards on which a job runs, the fullest form first."""
    short = [f"{clean_line(job.cards[0])} +{len(job.cards) - 1}"] if len(job.cards) > 1 else []
    return [clean_line(job.place), *short]


def _waiting_block(waiting: Sequence[JobState], overview: Overview, screen: Screen) -> _Block:
    """What waits on this page. The command for the next page names the last job shown."""
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
    """The lines of the header and of each job. The reason is never cut: on a narrow screen it wraps.

    A reason that several jobs share is printed once.
    """
    whens = [_start(job.job_id, waits, now) for job in waiting]
    words = [waits.reasons[job.job_id].word for job in waiting]
    rows = [
        [
            str(job.job_id),
            screen.style(fit(job.name, 16 if screen.width < 110 else 24), bold=True),
            fit(job.user, 8),
            _asked(job, waits, screen),
            screen.style(f"{word:<8}", fg=_WORD_COLORS.get(word)),
        ]
        for job, word in zip(waiting, words, strict=True)
    ]
    header, *lines = table(["JOB", "NAME", "OWNER", "GiB", "WAITS FOR"], rows, screen, right=("JOB", "GiB"))
    before = max(len(click.unstyle(line)) for line in [header, *lines]) + 1
    last = max(5, *map(len, whens))
    room = max(20, screen.width - before - last - 2)
    told = [[screen.dim(f"{click.unstyle(header):<{before + room}}  {'START':>{last}}")]]
    first_with: dict[tuple[str, str], int] = {}
    for line, job, when in zip(lines, waiting, whens, strict=True):
        wait = waits.reasons[job.job_id]
        shared = first_with.setdefault((wait.word, wait.sentence), job.job_id)
        sentence = clean_line(wait.sentence) if shared == job.job_id else f"as {shared}"
        first, *rest = textwrap.wrap(sentence, room) or [""]
        gap = " " * (before - len(click.unstyle(line)))
        told.append([f"{line}{gap}{first:<{room}}  {when:>{last}}", *(" " * before + part for part in rest)])
    return told


def _asked(job: JobState, waits: WaitingJobs, screen: Screen) -> str:
    """GiB of its card; with several cards, the number and the GiB of each, like 2×20.0."""
    asks = waits.asks.get(job.job_id)
    if asks is None or asks.cards == 1:
        return gib(job.vram_needed if asks is None else asks.bytes)
    return f"{asks.cards}{'×' if screen.unicode else 'x'}{gib(asks.bytes)}"


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
            state_word(job, screen),
            _result(job, answer.waits),
        ]
        for job in jobs
    ]
    headers = ["JOB", "NAME", "OWNER", *(["METHOD"] if wide else []), "ENDED", "STATUS", "RESULT"]
    done = next((job.job_id for job in jobs if job.status is Status.SUCCEEDED and job.report_uri), None)
    lines = wrapped_table(headers, rows, [""] * len(rows), screen, right=("JOB", "ENDED"))
    if answer.after is not None:
        lines.append(screen.dim(f"More: the same command with --after {answer.after}"))
    if done is not None:
        lines += ["", screen.dim(f"Its report: loractl report {done}   its adapter: loractl adapters pull {done} DIR")]
    return "\n".join(lines)


def _result(job: JobState, waits: WaitingJobs) -> str:
    if job.job_id in waits.reasons:
        return f"waits: {waits.reasons[job.job_id]}"
    result = job.message or (f"attempt {job.attempt} on {job.where}" if job.status is Status.RUNNING else "")
    return f"{job.reason.value}: {result}" if job.status is Status.FAILED and job.reason is not None else result
