"""Finished jobs side by side, and a sweep's members among them: as text, and as a picture."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loractl.common.errors import LoractlError, UsageError
from loractl.common.text import clean_line, in_words, number, signed
from loractl.common.units import duration, gib
from loractl.common.verdict import decimals
from loractl.scheduler.cli.screen import Screen, number_columns, table
from loractl.scheduler.status.standing import settings_of, shares, titles

from .answer import ACCURACY, OTHER_LOSS, Comparison, FinishedJob
from .winner import SweepComparison

OF_PAIRS = (ACCURACY,)
"""Also for jobs whose losses differ in kind."""

OTHERS = (*OF_PAIRS, "accuracy", "exact_match", "rougeL")


def comparison_text(answer: Comparison, screen: Screen) -> str:
    """Losses, memory and time, and below them the settings in which the jobs differ."""
    jobs, others = answer.jobs, _others(answer)
    heads = [_title(answer.best, name) for name in others]
    rows = [
        [
            str(job.job_id),
            clean_line(job.report["job"]["name"])[:28],
            job.report["method"],
            *_judged(answer, job, screen),
            job.verdict.lower(),
            *(number(job.metrics[name]["tuned"], 1) for name in others),
            gib(job.report["training"]["peak_memory_bytes"]),
            duration(job.report["wall_seconds"]),
        ]
        for job in jobs
    ]
    headers = ["JOB", "NAME", "METHOD", "LOSS", "AGAINST THE BEST", "READING", "VERDICT", *heads, "PEAK GIB", "TIME"]
    lines = table(headers, rows, screen, right=("JOB", "LOSS", "PEAK GIB", "TIME", *heads))
    lines += ["", *_settings_apart(answer, screen), *_note(answer, screen)]
    return "\n".join(lines)


def _others(answer: Comparison, among: Sequence[str] = OTHERS) -> list[str]:
    """Measures printed next to the loss: those that all jobs have, first the one that decides, then others that job
    files define."""
    own = sorted((m for m in answer.best.metrics.values() if m.get("own")), key=lambda m: not m.get("decides"))
    names = [*(metric["name"] for metric in own), *among] if among is OTHERS else among
    return [name for name in names if all(name in job.metrics for job in answer.jobs)][:2]


def sweep_comparison_text(answer: SweepComparison, screen: Screen) -> str:
    """The best member, the finished members compared, and the stopped members below."""
    lines = [
        screen.style(answer.sentence, bold=True),
        *filter(None, [clean_line(answer.second_look)]),
        "",
        *_finished(answer, screen),
    ]
    stopped = _stopped(answer, screen)
    if stopped:
        lines += ["", "Stopped early:", *stopped]
    best = answer.comparison.best.job_id
    if others := " and ".join(answer.comparison.contents):
        lines += ["", f"Not the same in all of them, under the same settings: {others}."]
    lines += _note(answer.comparison, screen)
    lines.append(screen.dim(f"Its report: loractl report {best}   its adapter: loractl adapters pull {best} DIR"))
    return "\n".join(lines)


def _judged(answer: Comparison, job: FinishedJob, screen: Screen) -> list[str]:
    """A job's loss, its change against the best job, and the reading."""
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
    rows = [[key, *map(clean_line, _settings(values))] for key, values in changed.items()]
    return table(["SETTING", *(str(job.job_id) for job in answer.jobs)], rows, screen)


_SHOWN, _BEFORE = 24, 6
"""Characters of a setting, and of what precedes the difference in a longer setting."""


def _settings(values: Sequence[Any]) -> list[str]:
    """The values of a setting, or of long values the part in which they differ."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if max(map(len, texts)) <= _SHOWN:
        return texts
    begin, end = _alike(texts), _alike([text[::-1] for text in texts])
    begin = max(0, begin - _BEFORE)
    return [_part(text, begin, max(begin + _BEFORE, len(text) - end + _BEFORE)) for text in texts]


def _alike(texts: Sequence[str]) -> int:
    """The number of characters that all values share at the start."""
    pairs = enumerate(zip(*texts, strict=False))
    return next((place for place, here in pairs if len(set(here)) > 1), min(map(len, texts)))


def _part(text: str, begin: int, end: int) -> str:
    dots, end = "\N{HORIZONTAL ELLIPSIS}", min(end, begin + _SHOWN, len(text))
    return f"{dots if begin else ''}{text[begin:end]}{dots if end < len(text) else ''}"


def _note(answer: Comparison, screen: Screen) -> list[str]:
    """What the changes mean, if a job was compared row by row, and which times are not a job's own."""
    shared = [str(job_id) for job_id in sorted(job.job_id for job in answer.jobs if job.companions)]
    if not shared:
        return _changes(answer, screen)
    whose = "it" if len(shared) == 1 else "they"
    beside = f"Time and peak memory of {in_words(shared)} are of a process that {whose} shared with other jobs."
    return [*_changes(answer, screen), screen.dim(beside)]


def _changes(answer: Comparison, screen: Screen) -> list[str]:
    judged = [job.against for job in answer.jobs if job.against]
    other = [str(job.job_id) for job in answer.jobs if answer.reading(job) == OTHER_LOSS]
    if other:
        learn = "learns" if len(other) == 1 else "learn"
        what = f"{in_words(other)} {learn} by another loss than {answer.best.job_id}: preference accuracy ranks them."
        lines = ["", screen.dim(what)]
    else:
        lines = []
    if not judged:
        return lines
    of = answer.best.kind.loss_of
    note = f"Change of the held-out loss in nats a {of} on the same {judged[0].rows} rows, with its 95 % interval"
    return [*lines, "", screen.dim(f"{note}; readings at 5 % for all pairs together (Holm).")]


def _finished(answer: SweepComparison, screen: Screen) -> list[str]:
    members = {member.job_id: member for member in answer.sweep.members}
    others = _others(answer.comparison, OF_PAIRS)
    heads = [_title(answer.comparison.best, name) for name in others]
    rows = [
        [
            str(job.job_id),
            *settings_of(answer.sweep, members[job.job_id]),
            *_judged(answer.comparison, job, screen),
            job.verdict.lower(),
            *(number(job.metrics[name]["tuned"], 1) for name in others),
            duration(job.report["wall_seconds"]),
        ]
        for job in answer.comparison.jobs
    ]
    headers = ["JOB", *titles(answer.sweep), "LOSS", "AGAINST THE BEST", "READING", "VERDICT", *heads, "TIME"]
    return table(headers, rows, screen, right=(*number_columns(headers, rows), "LOSS", *heads, "TIME"))


def _stopped(answer: SweepComparison, screen: Screen) -> list[str]:
    """The members that lost at a rung, best first; empty if none did."""
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


def require_matplotlib() -> None:
    """Raise LoractlError where matplotlib, an optional extra, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LoractlError("loractl compare --plot needs matplotlib", "pip install 'loractl[plot]'")


PICTURE_COLORS = ("#0b3d91", "#b5541c", "#3f9b8f", "#7a4fa3", "#8a8a8a")


def draw_comparison(answer: Comparison, path: Path) -> None:
    """Write the picture as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    jobs = answer.jobs
    figure = Figure(figsize=(9, 4.2 + 0.35 * len(jobs)), dpi=120, layout="constrained")
    curves, changes = figure.subplots(2, 1, height_ratios=(10, 2 + len(jobs)))
    for place, job in enumerate(jobs):
        style = {"color": PICTURE_COLORS[min(place, 4)], "linewidth": 2.0 if place == 0 else 1.3}
        points = [(s, v) for s, v in job.report["training"]["losses"] if v is not None]
        named = f"{job.job_id} {clean_line(job.report['job']['name'])}"
        curves.plot([s for s, _ in points], [v for _, v in points], label=named, **style)
        if job.against and math.isfinite(job.against.low):
            changes.plot([job.against.low, job.against.high], [-place, -place], **style)
        if job.against or place == 0:
            changes.plot([job.against.change if job.against else 0], [-place], "o", color=style["color"])
    curves.set_title("Training loss over the steps", loc="left", fontsize=10)
    curves.legend(loc="upper right", frameon=False, fontsize=9)
    changes.axvline(0, color="black", linewidth=0.8)
    changes.set_yticks([-n for n in range(len(jobs))], [str(job.job_id) for job in jobs])
    changes.set_title("Held-out loss against the best, 95 % interval (right: worse)", loc="left", fontsize=10)
    for axes in (curves, changes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UsageError(f"--plot {path} can't be written: {error.strerror}", "choose another folder") from error
