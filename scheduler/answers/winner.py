"""The best member of a sweep, and whether it is clearly the best: finished members compared, stopped ones below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loractl.common.units import duration
from loractl.scheduler.commands.compare import Compared, change, number, reading
from loractl.scheduler.text.screen import Screen, table
from loractl.scheduler.text.sweep import number_columns, settings_of, shares, short_keys, titles

if TYPE_CHECKING:
    from loractl.common.job.sweep import SweepView


def text(view: SweepView, jobs: Sequence[Compared], screen: Screen) -> str:
    """What `loractl compare --sweep` prints. `jobs`: the finished members, the best first."""
    lines = [screen.style(sentence(view, jobs), bold=True), "", *_finished(view, jobs, screen)]
    stopped = _stopped(view, screen)
    if stopped:
        lines += ["", "Stopped early:", *stopped]
    judged = [job.against for job in jobs if job.against]
    if judged:
        note = f"Change of the held-out loss in nats a token on the same {judged[0].rows} rows, with its 95 % interval"
        lines += ["", screen.dim(f"{note}; readings at 5 % for all together (Holm).")]
    lines.append(
        screen.dim(
            f"Its report: loractl report {jobs[0].job_id}   its adapter: loractl adapters pull {jobs[0].job_id} DIR"
        )
    )
    return "\n".join(lines)


def fields(view: SweepView, jobs: Sequence[Compared]) -> dict[str, Any]:
    """What the JSON has beside the compared jobs."""
    runner_up = jobs[1] if len(jobs) > 1 else None
    return {
        "sweep_id": view.sweep_id,
        "ended": view.ended,
        "winner": {
            "job_id": jobs[0].job_id,
            "runner_up": None if runner_up is None else runner_up.job_id,
            "clear": runner_up is not None and reading(runner_up, jobs[0]) == "worse",
            "sentence": sentence(view, jobs),
        },
        "stopped": [
            {"job_id": m.job_id, "settings": dict(m.settings), "step": m.step, "total_steps": m.total_steps,
             "rungs": [vars(point) for point in m.rungs]}
            for m in view.members if m.pruned
        ],
    }  # fmt: skip


def sentence(view: SweepView, jobs: Sequence[Compared]) -> str:
    """Who has the least held-out loss, and whether that is a clear difference from the next one."""
    best = jobs[0]
    member = next(one for one in view.members if one.job_id == best.job_id)
    pairs = zip(short_keys(view).values(), settings_of(view, member), strict=True)
    settings = ", ".join(f"{name} {text}" for name, text in pairs)
    so_far = "" if view.ended else " so far"
    head = f"Best{so_far}: {best.job_id} ({settings}), held-out loss {number(best.loss, 3)}"
    if len(jobs) == 1:
        return f"{head}, the only member with a result."
    next_one, found = jobs[1], reading(jobs[1], best)
    if found == "worse":
        return f"{head}, clearly less than the runner-up {next_one.job_id}."
    why = {
        "no clear difference": "no clear difference from",
        "too few rows": "on too few rows to tell it from",
    }.get(found, "measured on other rows than")
    return f"{head}; {why} the runner-up {next_one.job_id} ({number(next_one.loss, 3)})."


def _finished(view: SweepView, jobs: Sequence[Compared], screen: Screen) -> list[str]:
    members = {member.job_id: member for member in view.members}
    rows = [
        [
            str(job.job_id),
            *settings_of(view, members[job.job_id]),
            screen.style(number(job.loss, 3), bold=job is jobs[0]),
            change(job),
            reading(job, jobs[0]),
            duration(job.report["wall_seconds"]),
        ]
        for job in jobs
    ]
    headers = ["JOB", *titles(view), "LOSS", "AGAINST THE BEST", "READING", "TIME"]
    return table(headers, rows, screen, right=(*number_columns(headers, rows), "LOSS", "TIME"))


def _stopped(view: SweepView, screen: Screen) -> list[str]:
    """Those that lost at a rung, the best of them first; empty when none did."""
    lost = sorted(
        (m for m in view.members if m.pruned and m.rungs), key=lambda m: (-m.rungs[-1].rung, m.rungs[-1].loss)
    )
    rows = [
        [
            str(m.job_id),
            *settings_of(view, m),
            shares([m.rungs[-1].rung]),
            str(m.rungs[-1].step),
            number(m.rungs[-1].loss, 3),
        ]
        for m in lost
    ]
    headers = ["JOB", *titles(view), "STOPPED AT", "STEP", "LOSS THERE"]
    return table(headers, rows, screen, right=(*number_columns(headers, rows), "STOPPED AT")) if rows else []
