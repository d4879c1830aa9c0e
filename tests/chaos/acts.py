"""Does a history keep what people were told: of edits, holds, retries, tags, gc, sweeps and priority?"""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from loractl.common.job.status import OUTCOMES, Reason, Status
from loractl.common.placement.duration import UNKNOWN_S
from loractl.common.placement.preemption import RATIO

from .history import Act, AttemptRow, Broken, Change, History
from .trainer import loss_of

PEOPLE_PROMISES = {
    11: "an acknowledged edit, hold, release, retry or tag is never lost",
    12: "gc removes nothing of an unfinished or tagged job, and only the older results of a name",
    13: "a job gives way only to a higher priority or a much shorter job, and ends; only an end that counts spends a "
    "retry",
    14: "a sweep stops only losers",
}

RESULT = {"adapter_uri", "report_uri", "manifest_sha256"}

LEFT = {"checkpoint", "result_host", "result_until"}
"""Columns of an ended job that gc empties beside those of its result."""

IN_FLIGHT = dt.timedelta(seconds=30)
"""A change may still be committed so long after its command was told that the database is away."""


def check_acts(history: History) -> Iterator[Broken]:
    """Every breach of what people were told."""
    for one in (_edits, _holds, _retries, _tags, _gc, _preempted, _spent, _pruned):
        yield from one(history)


def counts_of(history: History) -> list[tuple[str, str]]:
    """What people asked for and got, and what came of it, for the report."""
    heard = Counter(act.kind for act in history.acts if act.acknowledged)
    reasons = Counter(attempt.reason for attempt in history.attempts)
    swept = {job["sweep_id"] for job in history.jobs.values() if job.get("sweep_id") is not None}
    kinds = {"edit": "edits", "hold": "holds", "retry": "retries and releases", "tag": "tags", "gc": "runs of gc"}
    return [
        ("acknowledged " + ", ".join(kinds.values()), ", ".join(str(heard[kind]) for kind in kinds)),
        ("sweeps, members that they stopped", f"{len(swept)}, {reasons[Reason.PRUNED]}"),
        ("results that gc removed", str(sum(1 for _ in _taken(history)))),
        ("attempts that gave way to another job", str(reasons[Reason.PREEMPTED])),
        ("of them to a much shorter one", str(len(gave_way_to_shorter(history)))),
    ]


def gave_way_to_shorter(history: History) -> list[AttemptRow]:
    """Attempts that did."""
    return [one for one in history.attempts if one.reason == Reason.PREEMPTED and "much shorter" in one.message]


def reopenings_of(history: History, job_id: int) -> list[Act]:
    """Retries that were asked for: each may have opened the job again."""
    return [act for act in history.acts if act.kind == "retry" and act.job_id == job_id]


def reopened(history: History, change: Change) -> bool:
    """Whether a change of an ended job is a retry of it."""
    old, new = change.old, change.new
    back = old is not None and new is not None and Status(new["status"]) is Status.QUEUED
    return back and any(_in_time(act, change.at) for act in reopenings_of(history, change.job_id))


def is_gc_s_own(history: History, change: Change) -> bool:
    """Whether a change of an ended job is what gc does: it empties columns of what it takes."""
    old, new = change.old, change.new
    if old is None or new is None or not any(_in_time(act, change.at) for act in history.acts if act.kind == "gc"):
        return False
    return all(name in RESULT | LEFT and new[name] is None for name in new if new[name] != old.get(name))


def lost_to_gc(history: History, job_id: int) -> bool:
    """Whether gc took the job's result; whether it might is asked elsewhere."""
    return any(change.job_id == job_id for change in _taken(history))


def _in_time(act: Act, at: dt.datetime) -> bool:
    answered = act.over_at if act.acknowledged else None
    return act.asked_at <= at <= (answered or (act.over_at or act.asked_at) + IN_FLIGHT)


def _edits(history: History) -> Iterator[Broken]:
    """The last value of each key that was acknowledged is in the row, or one that was asked for later."""
    told: dict[tuple[int, str], list[Act]] = {}
    for act in history.acts:
        if act.kind == "edit":
            told.setdefault((act.job_id, act.key), []).append(act)
    for (job_id, key), acts in told.items():
        heard = [number for number, act in enumerate(acts) if act.acknowledged]
        if not heard or job_id not in history.jobs:
            continue
        found: Any = history.jobs[job_id]["spec"]
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found not in (wanted := [act.value for act in acts[heard[-1] :]]):
            yield Broken(promise=11, what=f"job {job_id} has {key} {found}, {wanted[0]} was acknowledged")


def _holds(history: History) -> Iterator[Broken]:
    for act in history.acts:
        if act.kind != "hold" or not act.acknowledged or act.over_at is None:
            continue
        free = min((a.asked_at for a in reopenings_of(history, act.job_id) if a.asked_at > act.asked_at), default=None)
        for attempt in history.attempts:
            since = attempt.job_id == act.job_id and attempt.started_at > act.over_at
            if since and (free is None or attempt.started_at < free):
                what = f"job {act.job_id} was held, and attempt {attempt.attempt} started"
                yield Broken(promise=11, what=what)


def _retries(history: History) -> Iterator[Broken]:
    """What was acknowledged as queued again was queued: ended before, or held."""
    changes = history.of_job()
    for act in history.acts:
        if act.kind == "retry" and act.acknowledged:
            own = (c for c in changes.get(act.job_id, []) if _in_time(act, c.at))
            if not any(c.old and c.new and _waits(c.new) for c in own):
                yield Broken(promise=11, what=f"job {act.job_id} was to be queued again, and was not")


def _waits(row: dict[str, Any]) -> bool:
    return row["status"] == "queued" and not row.get("held")


def _tags(history: History) -> Iterator[Broken]:
    for job_id in {act.job_id for act in history.acts if act.kind == "tag" and act.acknowledged}:
        if history.jobs.get(job_id, {}).get("adapter_uri") is None or job_id not in history.adapters:
            yield Broken(promise=11, what=f"job {job_id} was tagged, and its adapter is gone")


def _taken(history: History) -> Iterator[Change]:
    """Where a job's result left its row."""
    for change in history.changes:
        old, new = change.old, change.new
        had = change.what == "job" and old is not None and old["adapter_uri"] is not None
        if had and new is not None and new["adapter_uri"] is None and new["status"] == Status.SUCCEEDED:
            yield change


def _gc(history: History) -> Iterator[Broken]:
    for change in _taken(history):
        job = history.jobs[change.job_id]
        name = f"the result of job {change.job_id}"
        if not is_gc_s_own(history, change):
            yield Broken(promise=12, what=f"{name} went, and nobody had asked for that")
        newer = [
            other
            for other in history.jobs.values()
            if (other["user"], other["name"]) == (job["user"], job["name"])
            and other["status"] == Status.SUCCEEDED
            and job["ended_at"] < other["ended_at"] <= change.at
        ]
        if not newer:
            yield Broken(promise=12, what=f"{name} was the newest of {job['user']}'s {job['name']}, and gc took it")
    for change in history.changes:
        old, new = change.old, change.new
        had = change.what == "job" and old is not None and old["checkpoint"] is not None
        lives = had and new is not None and not Status(new["status"]).is_terminal
        if lives and new["checkpoint"] is None and not reopened(history, change):
            yield Broken(promise=12, what=f"job {change.job_id} lives, and its checkpoint was forgotten")


def _ended_by(history: History, reason: Reason) -> Iterator[tuple[AttemptRow, Change]]:
    """Attempts that ended so, with the change of the job's row."""
    changes = history.of_job()
    for attempt in history.attempts:
        if attempt.reason == reason:
            for change in changes.get(attempt.job_id, []):
                ran = change.old is not None and change.old["token"] == attempt.token
                if ran and change.new is not None and change.new["token"] is None:
                    yield attempt, change
                    break


def _preempted(history: History) -> Iterator[Broken]:
    changes = history.of_job()
    for attempt, change in _ended_by(history, Reason.PREEMPTED):
        old, name = change.old or {}, f"attempt {attempt.attempt} of job {attempt.job_id}"
        if not Status(history.jobs[attempt.job_id]["status"]).is_terminal:
            yield Broken(promise=13, what=f"{name} gave way, and its job never ended")
        if not old["preemptible"] and not old["yields"]:
            yield Broken(promise=13, what=f"{name} gave way, and its job is not preemptible")
        asked = [
            c for c in changes[attempt.job_id] if c.new and c.new["preempted_by"] and c.new["token"] == attempt.token
        ]
        if not asked:
            yield Broken(promise=13, what=f"{name} gave way to nobody")
            continue
        other = [c for c in changes.get(asked[0].new["preempted_by"], []) if c.new and c.at <= asked[0].at]
        mine, number = asked[0].new or {}, (asked[0].new or {})["preempted_by"]
        if not other or not (_is_urgent(mine, other[-1].new or {}) or _is_shorter(mine, other[-1].new or {})):
            yield Broken(promise=13, what=f"{name} gave way to job {number} of no higher priority, and not shorter")


def _is_urgent(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(mine["preemptible"]) and other["priority"] > mine["priority"]


def _is_shorter(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """As the row said what was left, which is what the round has read."""
    left_s = mine["eta_seconds"] if mine["eta_seconds"] is not None else UNKNOWN_S
    return bool(mine["yields"]) and other["priority"] >= mine["priority"] and left_s >= RATIO * other["work_left_s"]


def _spent(history: History) -> Iterator[Broken]:
    """A retry is spent by the ends that count, and by nothing else."""
    for change in history.changes:
        old, new = change.old, change.new
        if change.what != "job" or not old or not new or (old["status"], new["status"]) != ("running", "queued"):
            continue
        counts = OUTCOMES[Reason(new["reason"])].counts
        if new["retries_used"] != old["retries_used"] + counts:
            spent = f"{old['retries_used']} retries before, {new['retries_used']} afterwards"
            yield Broken(promise=13, what=f"job {change.job_id} waits again after {new['reason']}: {spent}")


def _pruned(history: History) -> Iterator[Broken]:
    """A member that is the best at every rung goes on, in whatever order they come."""
    best: dict[int, float] = {}
    for job in history.jobs.values():
        if (sweep := job.get("sweep_id")) is not None:
            best[sweep] = min(best.get(sweep, math.inf), loss_of(job["spec"]["training"]["learning_rate"]))
    for attempt in history.attempts:
        if attempt.reason == Reason.PRUNED:
            job = history.jobs[attempt.job_id]
            sweep = job.get("sweep_id")
            if sweep is None or loss_of(job["spec"]["training"]["learning_rate"]) <= best[sweep]:
                yield Broken(promise=14, what=f"job {attempt.job_id} was stopped, and is no loser of a sweep")
