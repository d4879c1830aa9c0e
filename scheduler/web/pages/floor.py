"""The whole lab at one moment: cards and what holds them, what runs, what waits and why, and what has ended."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loractl.common.errors import ArtifactError
from loractl.common.placement.shares import LAST, NONE_LEFT
from loractl.common.store.fleet import FleetView
from loractl.common.store.records import Choice, Page
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import duration, gib
from loractl.scheduler.fleet.answer import Fleet, fleet_of
from loractl.scheduler.status.job import JobState, state_of
from loractl.scheduler.status.overview import Overview, overview
from loractl.scheduler.wait.sooner import without_others

from .drawing import card_parts
from .shelf import ReportDigest, ReportShelf, digest

SHOWN_RUNNING = 60
"""Running jobs on the lab's page; a larger lab lists all of them under jobs."""

SHOWN_ENDED = 8

SPARK_POINTS = 40

ASKED_FOR_ROOM = 10
"""Waiting jobs that are checked for a start without other people's programs."""


@dataclass(frozen=True, kw_only=True)
class EndedJob:
    """A job that has just ended, and what its report says if already read."""

    job: JobState
    report: ReportDigest | None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something a person should know, and the command that shows more."""

    text: str
    command: str


@dataclass(frozen=True, kw_only=True)
class OwnersShare:
    """What counts against a user, and what their programs hold outside the queue."""

    user: str
    gib_hours: float | None  # half of it is forgotten after a day; None: not known, and no job of theirs starts
    outside: int  # bytes now
    quota: str = ""  # what new jobs do while the user is beyond a quota: go last, wait


@dataclass(frozen=True, kw_only=True)
class LabFloor:
    """The lab's page."""

    seen: Overview
    fleet: Fleet
    running: tuple[JobState, ...]
    waiting: tuple[JobState, ...]
    in_order: bool  # waiting jobs are in the order in which the rule tries them; else by priority and age
    sparks: Mapping[int, Sequence[float]]  # losses of running jobs, thinned
    ended: tuple[EndedJob, ...]  # of a day, newest first
    shares: tuple[OwnersShare, ...]  # largest first
    notices: tuple[Notice, ...]

    @property
    def part_kinds(self) -> frozenset[str]:
        """The kinds of parts in the cards' bars: job, outside."""
        return frozenset(part.kind for device in self.fleet.devices for part in card_parts(device))

    @property
    def silent(self) -> frozenset[str]:
        """Cards that have not been seen for a while though nobody ordered that."""
        return frozenset(device.row.node for device in self.fleet.devices if device.silent_s is not None)


def lab_floor(store: Store, shelf: ReportShelf, choice: Choice, page: Page) -> LabFloor:
    """The lab as it is now. Raises JobNotFound for a page after a job that does not exist."""
    view = store.cards.fleet()
    seen = overview(store, choice, page, view=view, with_sweeps=False)
    shown = seen.running[:SHOWN_RUNNING]
    in_order = page.after is None and seen.after is None
    points = store.jobs.thinned([job.job_id for job in shown], "loss", SPARK_POINTS) if shown else []
    losses = {job_id: list(run) for job_id, run in itertools.groupby(points, lambda point: point.job_id)}
    return LabFloor(
        seen=seen,
        fleet=fleet_of(view),
        running=shown,
        waiting=tuple(_as_tried(store, seen)) if in_order else seen.waiting,
        in_order=in_order,
        sparks={job_id: [point.value for point in run] for job_id, run in losses.items()},
        ended=tuple(_ended(job, shelf) for job in store.jobs.ended(view.now - dt.timedelta(days=1), SHOWN_ENDED)),
        shares=tuple(_shares(view)),
        notices=tuple(itertools.islice(_notices(store, seen, view), 4)),
    )


def _as_tried(store: Store, seen: Overview) -> list[JobState]:
    """The waiting jobs, if the page has all of them: in the order in which the rule tries them, then those that it does
    not try now."""
    turns = {job.job_id: turn for turn, job in enumerate(store.jobs.ready(len(seen.waiting) + 1))}
    last = len(turns)

    def place(job: JobState) -> tuple[bool, int, int]:
        never = seen.waits.reasons[job.job_id].word == "never"
        return never, turns.get(job.job_id, last), job.job_id

    return sorted(seen.waiting, key=place)


def _ended(job: Job, shelf: ReportShelf) -> EndedJob:
    report = shelf.known(job.job_id, job.manifest_sha256) if job.report_uri else None
    try:
        return EndedJob(job=state_of(job), report=None if report is None else digest(report))
    except ArtifactError:
        return EndedJob(job=state_of(job), report=None)


def _shares(view: FleetView) -> list[OwnersShare]:
    outside: dict[str, int] = {}
    for node in view.nodes.values():
        for process in node.outside:
            user = str(process.get("user") or "")
            outside[user] = outside.get(user, 0) + int(process.get("bytes") or 0)
    outside.pop("", None)
    users = view.charges.keys() | outside.keys()
    shares = [_share(user, view.charges.get(user, 0.0), outside.get(user, 0)) for user in users]
    return sorted(shares, key=lambda s: (s.gib_hours is not None, -(s.gib_hours or 0), -s.outside, s.user))[:12]


def _share(user: str, charge: float, outside: int) -> OwnersShare:
    """What counts against a user, without what a quota adds to put the user last."""
    if charge == NONE_LEFT:
        return OwnersShare(user=user, gib_hours=None, outside=outside, quota="wait")
    if charge >= LAST:
        return OwnersShare(user=user, gib_hours=charge - LAST, outside=outside, quota="go last")
    return OwnersShare(user=user, gib_hours=charge, outside=outside)


def _notices(store: Store, seen: Overview, view: FleetView) -> Iterator[Notice]:
    stopped_s = fleet_of(view).stopped_s
    if stopped_s is not None:
        text = f"No worker has run the fleet's round for {duration(stopped_s)}: lost workers are not noticed."
        yield Notice(text=text, command="loractl doctor")
    for name, node in view.nodes.items():
        if (fault := node.fault) is not None:
            yield Notice(text=f"{name} is closed: {fault}", command="loractl gpus")
    waiting = [job for job in seen.waiting if seen.waits.reasons[job.job_id].word in ("memory", "busy")]
    rows = store.jobs.numbered([state.job_id for state in waiting[:ASKED_FOR_ROOM]])
    for state in waiting[:ASKED_FOR_ROOM]:
        held = without_others(rows[state.job_id], view) if state.job_id in rows else None
        if held is not None:
            yield Notice(text=_held_text(view, *held, state), command=f"loractl why {state.job_id}")
            return


def _held_text(view: FleetView, card: str, program: str, job: JobState) -> str:
    node = view.nodes[card]
    others = f" and {len(node.outside) - 1} more hold" if len(node.outside) > 1 else " holds"
    load = "" if node.load is None else f", load {node.load} %"
    return (
        f"{program}{others} {gib(node.outside_bytes)} GiB of {card} outside the queue{load}. "
        f"Without it, {job.name} ({job.job_id}) would fit now."
    )
