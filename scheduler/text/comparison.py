"""How finished jobs look side by side, and the members of a sweep among them."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from loractl.common.text import clean_line, number, signed
from loractl.common.units import duration, gib
from loractl.common.verdict import decimals
from loractl.scheduler.answers.sweep import settings_of

from .screen import Screen, table
from .sweep import number_columns, shares, titles

if TYPE_CHECKING:
    from loractl.scheduler.answers.comparison import Comparison, FinishedJob
    from loractl.scheduler.answers.sweep import SweepComparison


def comparison_text(answer: Comparison, screen: Screen) -> str:
    """Losses, memory and time, and below them the settings in which the jobs differ."""
    jobs = answer.jobs
    others = [name for name in ("accuracy", "exact_match", "rougeL") if all(name in job.metrics for job in jobs)][:2]
    heads = [_title(answer.best, name) for name in others]
    rows = [
        [
            str(job.job_id),
            clean_line(job.report["job"]["name"])[:28],
            job.report["method"],
            *_judged(answer, job, screen),
            *(number(job.metrics[name]["tuned"], 1) for name in others),
            gib(job.report["training"]["peak_memory_bytes"]),
            duration(job.report["wall_seconds"]),
        ]
        for job in jobs
    ]
    headers = ["JOB", "NAME", "METHOD", "LOSS", "AGAINST THE BEST", "READING", *heads, "PEAK GIB", "TIME"]
    lines = table(headers, rows, screen, right=("JOB", "LOSS", "PEAK GIB", "TIME", *heads))
    lines += ["", *_settings_apart(answer, screen), *_note(answer, screen)]
    return "\n".join(lines)


def sweep_comparison_text(answer: SweepComparison, screen: Screen) -> str:
    """Who is best, the finished members compared, and the stopped ones below."""
    lines = [screen.style(answer.sentence, bold=True), "", *_finished(answer, screen)]
    stopped = _stopped(answer, screen)
    if stopped:
        lines += ["", "Stopped early:", *stopped]
    best = answer.comparison.best.job_id
    lines += _note(answer.comparison, screen)
    lines.append(screen.dim(f"Its report: loractl report {best}   its adapter: loractl adapters pull {best} DIR"))
    return "\n".join(lines)


def _judged(answer: Comparison, job: FinishedJob, screen: Screen) -> list[str]:
    """A job's loss, its change against the best one, and the reading."""
    return [screen.style(number(job.measured_loss, 3), bold=job is answer.best), _change(job), answer.reading(job)]


def _change(job: FinishedJob) -> str:
    if (against := job.against) is None:
        return ""
    digits = decimals(against.change, against.low, against.high, least=3)
    change, low, high = (signed(value, digits) for value in (against.change, against.low, against.high))
    return change if math.isnan(against.low) else f"{change} ({low} to {high})"


def _title(job: FinishedJob, name: str) -> str:
    metric = job.metrics[name]
    return str(metric["label"]).upper() + (" %" if metric["unit"] == "%" else "")


def _settings_apart(answer: Comparison, screen: Screen) -> list[str]:
    changed = answer.differences
    if not changed:
        return ["The jobs have the same settings."]
    rows = [[key, *(clean_line(_setting(value)) for value in values)] for key, values in changed.items()]
    return table(["SETTING", *(str(job.job_id) for job in answer.jobs)], rows, screen)


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"\N{HORIZONTAL ELLIPSIS}{text[-23:]}"


def _note(answer: Comparison, screen: Screen) -> list[str]:
    """What the changes are; empty where no job was compared row by row."""
    judged = [job.against for job in answer.jobs if job.against]
    if not judged:
        return []
    of = "row" if answer.best.task == "SEQ_CLS" else "token"
    note = f"Change of the held-out loss in nats a {of} on the same {judged[0].rows} rows, with its 95 % interval"
    return ["", screen.dim(f"{note}; readings at 5 % for all together (Holm).")]


def _finished(answer: SweepComparison, screen: Screen) -> list[str]:
    members = {member.job_id: member for member in answer.sweep.members}
    rows = [
        [
            str(job.job_id),
            *settings_of(answer.sweep, members[job.job_id]),
            *_judged(answer.comparison, job, screen),
            duration(job.report["wall_seconds"]),
        ]
        for job in answer.comparison.jobs
    ]
    headers = ["JOB", *titles(answer.sweep), "LOSS", "AGAINST THE BEST", "READING", "TIME"]
    return table(headers, rows, screen, right=(*number_columns(headers, rows), "LOSS", "TIME"))


def _stopped(answer: SweepComparison, screen: Screen) -> list[str]:
    """Those that lost at a rung, the best of them first; empty when none did."""
    lost = sorted((m for m in answer.stopped if m.rungs), key=lambda m: (-m.rungs[-1].rung, m.rungs[-1].loss))
    rows = [
        [
            str(member.job_id),
            *settings_of(answer.sweep, member),
            shares([member.rungs[-1].rung]),
            str(member.rungs[-1].step),
            number(member.rungs[-1].loss, 3),
        ]
        for member in lost
    ]
    headers = ["JOB", *titles(answer.sweep), "STOPPED AT", "STEP", "LOSS THERE"]
    return table(headers, rows, screen, right=(*number_columns(headers, rows), "STOPPED AT")) if rows else []
