"""Sweeps on a terminal: each as a line among the jobs, or in full with one row per member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loractl.common.job.status import Stage, Status
from loractl.common.job.sweep import Member, SweepView, no_best
from loractl.common.text import clean_line, in_short
from loractl.common.units import thousands
from loractl.scheduler.cli.screen import Screen, bar, fit, number_columns, table, wrapped_table

from .standing import SweepStanding, count, loss_of, named_settings, settings_of, shares, titles

_DOING = {
    Stage.PREPARING: "prepares",
    Stage.TRAINING: "trains",
    Stage.EVALUATING: "evaluates",
    Stage.STORING: "is stored",
}
_ENDED = {Status.SUCCEEDED: "done", Status.FAILED: "failed", Status.CANCELLED: "cancelled"}
_SELDOM = ("failed", "cancelled")  # shown only if there is such a member
_COLORS = {Status.SUCCEEDED: "green", Status.FAILED: "red", Status.RUNNING: "blue"}


def overview(views: Sequence[SweepView], screen: Screen) -> list[str]:
    """Each sweep in one line: the state of its members, and the best so far."""
    counts = [count(view) for view in views]
    names = [name for name in counts[0] if name not in _SELDOM or any(each[name] for each in counts)] if counts else []
    titles = {"running": "RUN", "waiting": "WAIT"}
    headers = ["SWEEP", "NAME", "OWNER", *(titles.get(name, name.upper()) for name in names), "BEST SO FAR"]
    times = "×" if screen.unicode else "x"
    rows = [
        [
            str(view.sweep_id),
            screen.style(f"{fit(view.name, 16)} {times}{len(view.members)}", bold=True),
            fit(view.user, 8),
            *(str(each[name]) for name in names),
            "–" if view.best is None else f"{loss_of(view.best)} with {named_settings(view, view.best)}",
        ]
        for view, each in zip(views, counts, strict=True)
    ]
    return wrapped_table(headers, rows, [""] * len(rows), screen, right=("SWEEP", *headers[3:-1]))


def opened(standing: SweepStanding, screen: Screen) -> str:
    """A sweep with one row per member; at its end the best member, and what stopping the losers saved."""
    view = standing.sweep
    named = screen.style(f"Sweep {view.sweep_id} {clean_line(view.name)}", bold=True)
    lines = [f"{named} by {clean_line(view.user)}: {len(view.members)} jobs, {_told(count(view))}."]
    if view.rungs:
        lines.append(f"Losers stop after {shares(view.rungs)} of their steps.")
    headers = ["JOB", *titles(view), "PROGRESS", "LOSS", "AT", "STATE"]
    rows = [_row(standing, member, screen) for member in view.members]
    lines += ["", *table(headers, rows, screen, right=(*number_columns(headers, rows), "LOSS", "AT"))]
    if view.best is not None:
        best = f"{view.best.job_id} ({named_settings(view, view.best)}), held-out loss {loss_of(view.best)}"
        lines += ["", screen.style("Best: " if view.ended else "Best so far: ", bold=True) + best + "."]
    elif view.unlike is not None:
        lines += ["", f"{no_best(view).capitalize()}."]
    saved, steps = view.saved_steps
    if view.ended and view.rungs and steps:
        part = f"{thousands(saved)} of {thousands(steps)} steps ({saved / steps * 100:.0f} %)"
        lines.append(f"Stopping the losers saved {part}.")
    return "\n".join([*lines, "", screen.dim(_next_command(view))])


def _row(standing: SweepStanding, member: Member, screen: Screen) -> list[str]:
    view, trouble = standing.sweep, standing.troubles.get(member.job_id)
    share = member.step / member.total_steps if member.step is not None and member.total_steps else None
    point = member.rungs[-1] if member.rungs else None
    at = "end" if member.final_loss is not None else "" if point is None else f"{point.rung * 100:g} %"
    return [
        str(member.job_id),
        *settings_of(view, member),
        screen.style(bar(share or 0.0, 10, screen), fg="blue") + (f" {share:4.0%}" if share is not None else "   – "),
        screen.style("–" if member.loss is None else f"{member.loss:.3f}", bold=member is view.best),
        at,
        screen.style(_state(member) + (f", {clean_line(trouble)}" if trouble else ""), fg=_COLORS.get(member.status)),
    ]


def _state(member: Member) -> str:
    if member.status is Status.QUEUED:
        return "held" if member.held else "waits"
    if member.status is Status.RUNNING:
        where = f" on {clean_line(in_short(member.cards or (member.node,)))}" if member.node else ""
        return (_DOING.get(member.stage, member.stage.value) if member.stage is not None else "starts") + where
    if member.pruned:
        return f"stopped at {member.rungs[-1].rung * 100:g} %" if member.rungs else "stopped"
    if member.status is Status.FAILED and member.reason is not None:
        return f"failed: {member.reason.value}"
    return _ENDED.get(member.status, member.status.value)


def _told(counts: Mapping[str, int]) -> str:
    words = {"running": "run", "waiting": "wait", "stopped": "stopped early"}
    return ", ".join(f"{number} {words.get(name, name)}" for name, number in counts.items() if number)


def _next_command(view: SweepView) -> str:
    if not view.members:
        return "It has no jobs."
    if not view.ended:
        waiting = [member.job_id for member in view.members if member.status is Status.QUEUED]
        first = view.members[0].job_id
        member = f"why one waits: loractl why {waiting[0]}" if waiting else f"one: loractl status {first}"
        return f"Drop it: loractl cancel --sweep {view.sweep_id}   {member}"
    if view.unlike is not None and any(member.has_result for member in view.members):
        return f"The members that have ended: loractl compare --sweep {view.sweep_id}"
    if view.best is None or view.best.final_loss is None:
        return f"What went wrong: loractl status {view.members[0].job_id}"
    best = f"its report: loractl report {view.best.job_id}"
    return f"Is it clearly the best? loractl compare --sweep {view.sweep_id}   {best}"
