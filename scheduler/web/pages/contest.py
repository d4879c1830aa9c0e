"""A sweep for its page: its members' lines, the grid of its settings, and the finished ones compared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loractl.common.errors import LoractlError
from loractl.common.job.sweep import Member, SweepView
from loractl.common.store.records import Page
from loractl.common.store.store import Store
from loractl.scheduler.compare.answer import FinishedJob, compared, flat_settings
from loractl.scheduler.compare.winner import SweepComparison
from loractl.scheduler.report.answer import seen
from loractl.scheduler.status.standing import short_keys, short_setting

from .shelf import UNREADABLE, ReportShelf

LINE_POINTS = 80

LINES = 60
"""Members whose lines are drawn; more of them are a grey band."""

REPORTS_WAIT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class SettingsGrid:
    """Members by two of the keys that a sweep varies."""

    across: str
    down: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Member | None, ...]], ...]  # a value of `down`, and the member of each column


@dataclass(frozen=True, kw_only=True)
class SweepContest:
    """A sweep with what its page shows."""

    sweep: SweepView
    lines: Mapping[int, Sequence[tuple[int, float]]]  # held-out loss by step, or training loss if none is measured
    held_out: bool  # which of the two losses
    grid: SettingsGrid | None  # None: it does not vary two keys
    comparison: SweepComparison | None  # None: no member has a readable result
    unread: int  # members with a result whose report could not be read, or not yet
    common: tuple[tuple[str, Any], ...]  # settings that are the same in all
    measured: Mapping[int, tuple[int | None, float | None]]  # peak bytes and seconds of finished members

    @property
    def leaders(self) -> tuple[int, ...]:
        """The three best members, whose lines are named; none where losses can't be compared."""
        if self.sweep.unlike is not None:
            return ()
        done = sorted((m.loss, m.job_id) for m in self.sweep.members if m.loss is not None)
        return tuple(job_id for _, job_id in done[:3])


def sweep_contest(store: Store, shelf: ReportShelf, sweep_id: int) -> SweepContest:
    """A sweep in full. Raises SweepNotFound."""
    sweep = store.sweeps.get(sweep_id)
    drawn = [member.job_id for member in sweep.members][:LINES]
    lines = _lines(store, drawn, "eval_loss")
    finished = _finished(shelf, store, sweep)
    reports = {job.job_id: job.report for job in finished}
    return SweepContest(
        sweep=sweep,
        lines=lines or _lines(store, drawn, "loss"),
        held_out=bool(lines),
        grid=_grid(sweep),
        comparison=_compared(store, shelf, sweep, finished),
        unread=sum(member.has_result for member in sweep.members) - len(finished),
        common=tuple(_common(store, sweep)),
        measured={job_id: _measured(report) for job_id, report in reports.items()},
    )


def newest_sweeps(store: Store, page: Page) -> tuple[list[SweepView], int | None]:
    """A page of the sweeps, newest first, and the sweep after which the next page starts."""
    found = store.sweeps.newest(page)
    ids = [row.sweep_id for row in found[: page.limit]]
    return store.sweeps.several(ids, settings=False)[::-1], ids[-1] if len(found) > len(ids) else None


def _lines(store: Store, job_ids: Sequence[int], name: str) -> dict[int, list[tuple[int, float]]]:
    points = store.jobs.thinned(job_ids, name, LINE_POINTS)
    return {
        job_id: sorted({point.step: point.value for point in run}.items())
        for job_id, run in itertools.groupby(points, lambda point: point.job_id)
    }


def _finished(shelf: ReportShelf, store: Store, sweep: SweepView) -> list[FinishedJob]:
    """The members with a result whose reports have been read by now."""
    rows = {job.job_id: job for job in store.jobs.matching(sweep_id=sweep.sweep_id) if job.report_uri is not None}
    for row in rows.values():
        shelf.known(row.job_id, row.manifest_sha256)  # all are requested before the first wait
    found, patience = [], REPORTS_WAIT_S
    for row in rows.values():
        try:
            report = shelf.report(row.job_id, row.manifest_sha256, wait_s=patience)
        except LoractlError:
            continue
        if report is None:
            patience = 0.0
        else:
            found.append(FinishedJob(job_id=row.job_id, spec=row.spec, report=report))
    return found


def _compared(
    store: Store, shelf: ReportShelf, sweep: SweepView, finished: list[FinishedJob]
) -> SweepComparison | None:
    if not finished:
        return None
    try:
        order = compared(finished)
        final = seen(store, order.best.job_id, shelf.final(order.best.job_id)) if sweep.ended else None
        found = SweepComparison(sweep=sweep, comparison=order, final=final)
        _ = found.second_look  # it reads more of the reports
    except (LoractlError, *UNREADABLE):
        return None
    return found


def _grid(sweep: SweepView) -> SettingsGrid | None:
    """The two keys with the most values, unless each point was drawn."""
    if len(sweep.varied) < 2 or sweep.trials is not None:
        return None
    values = {key: _in_order(member.settings[key] for member in sweep.members) for key in sweep.varied}
    down, across = sorted(values, key=lambda key: -len(values[key]))[:2]
    names = dict(zip(sweep.varied, short_keys(sweep), strict=True))
    best: dict[tuple[str, str], Member] = {}
    for member in sweep.members:
        place = (repr(member.settings[down]), repr(member.settings[across]))
        other = best.get(place)
        if other is None or (sweep.unlike is None and _before(member, other)):
            best[place] = member
    return SettingsGrid(
        across=names[across],
        down=names[down],
        columns=tuple(short_setting(value) for value in values[across]),
        rows=tuple(
            (short_setting(d), tuple(best.get((repr(d), repr(a))) for a in values[across])) for d in values[down]
        ),
    )


def _before(member: Member, other: Member) -> bool:
    return member.loss is not None and (other.loss is None or member.loss < other.loss)


def _in_order(values: Any) -> list[Any]:
    """Each value once: numbers by size, others in their given order."""
    different = list({repr(value): value for value in values}.values())
    numbers = all(isinstance(value, (int, float)) for value in different)
    return sorted(different) if numbers else different


def _common(store: Store, sweep: SweepView) -> list[tuple[str, Any]]:
    if not sweep.members:
        return []
    spec = store.jobs.get(sweep.members[0].job_id).spec
    return [(key, value) for key, value in flat_settings(spec) if key not in sweep.varied and key != "name"]


def _measured(report: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Peak and time; no peak if it shared its process: the peak is for all of its jobs."""
    try:
        training, seconds = report["training"], float(report["wall_seconds"])
        return None if training.get("companions") else int(training["peak_memory_bytes"]), seconds
    except UNREADABLE:
        return None, None
