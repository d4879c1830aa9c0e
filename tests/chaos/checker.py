"""Does a history keep the promises? A pure function, but for the look at the stored files."""

from __future__ import annotations

import datetime as dt
import json
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

from loractl.common.artifacts import WEIGHTS, ArtifactStore, Binding, attempt_prefix
from loractl.common.errors import ArtifactError
from loractl.common.job.identity import spec_digest
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import OUTCOMES, TRANSITIONS, Reason, Status
from loractl.worker.device.occupancy import run_mark

from .acts import PEOPLE_PROMISES, check_acts, is_gc_s_own, lost_to_gc, reopened, reopenings_of
from .history import AttemptRow, Broken, Change, History, Window
from .successes import unshown
from .trainer import last_link, read_adapter

PROMISES = {
    0: "the run proves something: each kind of operation succeeded while a fault was active",
    1: "a number that submit printed is never lost, and its job ends once",
    2: "at most one attempt publishes a result; an attempt that lost its lease writes nothing",
    3: "a finished job never changes, an acknowledged cancel never runs again",
    4: "a lost worker, and no living one, is noticed within its lease; its job goes on from the last good checkpoint",
    5: "succeeded means: adapter and report are stored, match their hashes and can be loaded",
    6: "no process remains after an attempt",
    7: "nothing fails because the database, the queue or the store is away",
    8: "no job fails for good because of the lab, bad boxes included",
    9: "what ends one job ends no other: none is cancelled or diverges for its neighbour on the card",
    10: "a job on two cards has both, on one box, or none; what ends one of its ranks or nodes ends the attempt",
    **PEOPLE_PROMISES,
    15: "a job starts only once the jobs that it starts after are over",
}

NOTICE_SLACK_S = 12.0
"""Beyond the lease: a node that is frozen in the middle of its round for the fleet, and the next node's round, take 2.8
s with a lease of 6 s (node.md); the rest is for a busy machine."""

LEFT_S = 45.0
"""A process may outlive its attempt so long, beside faults of its box: its node is frozen, wakes, and sweeps."""

RANK_S = 30.0
"""So long all ranks may outlive one of them: another fault has stopped the leader just then."""

HARMLESS = frozenset({"ok", "worker_lost", "drained", "cancelled", "killed", "gpu_error", "preempted", "pruned"})
"""Why attempts may end here. killed is how a trainer's kill ends; no more of them end so than were killed. gpu_error is
what the cards of a bad box say. acts.py looks at preempted and pruned."""


def check(history: History) -> list[Broken]:
    """Every breach that the history shows."""
    checks = (
        _ended_once,
        _one_result,
        _no_stale_write,
        _nothing_after_the_end,
        _noticed,
        _living,
        _resumed,
        _left,
        _alone,
        _gangs,
        check_acts,
        _in_turn,
        _in_spite,
    )
    found = [breach for one in checks for breach in one(history)]
    found += [Broken(promise=5, what=f"job {job}: {what}") for job, what in sorted(history.artifacts.items())]
    found += [Broken(promise=6, what=what) for what in history.left]
    return found + list(_nothing_failed(history))


def examine(store: ArtifactStore, job: dict[str, Any], url: str | None = None) -> str | None:
    """What is wrong with the stored result of a job that succeeded; None when it is whole and what was asked for.
    `url`: the store's, for those who put it there."""
    uri = job["adapter_uri"] or ""
    prefix = uri.removeprefix(f"{url or store.url}/").removesuffix("/adapter")
    stored = Binding(prefix=prefix, manifest_sha256=job["manifest_sha256"])
    asked = spec_digest(JobSpec.model_validate(job["spec"]))
    link = last_link(asked, job["data"]["path"]["sha256"], job["spec"]["training"]["max_steps"])
    try:
        store.verify(stored)
        adapter = read_adapter(store.read_bytes(stored, WEIGHTS))
        report = store.read_report(stored)
    except (ArtifactError, ValueError, KeyError, struct.error, json.JSONDecodeError) as error:
        return f"its artifacts can't be used: {error}"
    if adapter != link or report["chain"] != link.hex():
        return "its adapter is not what its spec, its data and its steps lead to"
    return None


def _ended_once(history: History) -> Iterator[Broken]:
    for job_id in history.printed:
        if job_id not in history.jobs:
            yield Broken(promise=1, what=f"job {job_id} was printed and is gone")
    for what in history.stuck:
        yield Broken(promise=1, what=what)
    changes = history.of_job()
    for job_id, job in history.jobs.items():
        if not Status(job["status"]).is_terminal:
            yield Broken(promise=1, what=f"job {job_id} is still {job['status']}")
        ends = [c for c in changes.get(job_id, []) if _ends(c)]
        if len(ends) > 1 + sum(reopened(history, c) for c in changes.get(job_id, [])):
            yield Broken(promise=1, what=f"job {job_id} ended {len(ends)} times")
        elif not ends and Status(job["status"]).is_terminal:
            yield Broken(promise=1, what=f"job {job_id} is {job['status']} and never ended")


def _ends(change: Change) -> bool:
    before, after = _status(change.old), _status(change.new)
    return after is not None and after.is_terminal and (before is None or not before.is_terminal)


def _status(row: dict[str, Any] | None) -> Status | None:
    return None if row is None else Status(row["status"])


def _one_result(history: History) -> Iterator[Broken]:
    for job_id, job in history.jobs.items():
        well = [a.attempt for a in history.attempts if a.job_id == job_id and a.reason == "ok"]
        listed = history.adapters.get(job_id)
        if len(well) > 1:
            yield Broken(promise=2, what=f"attempts {well} of job {job_id} all ended well")
        if job["status"] != Status.SUCCEEDED:
            if listed is not None or job["adapter_uri"] is not None or well:
                yield Broken(promise=2, what=f"job {job_id} is {job['status']} and has a result")
            continue
        if listed is None and well and lost_to_gc(history, job_id):
            continue
        if listed is None or not well:
            yield Broken(promise=2, what=f"job {job_id} succeeded without a result")
            continue
        prefix = attempt_prefix(job_id, well[0])
        uris = (job["adapter_uri"] or "", listed["uri"])
        if listed["attempt"] != well[0] or not all(uri.endswith(f"/{prefix}/adapter") for uri in uris):
            yield Broken(promise=2, what=f"job {job_id}: attempt {well[0]} ended well, {uris} are listed")


def _no_stale_write(history: History) -> Iterator[Broken]:
    """Whatever was written for an attempt, was written in a transaction that found its token in the job's row."""
    tokens = {(a.job_id, a.attempt): a.token for a in history.attempts}
    held: dict[tuple[int, int], set[str | None]] = {}
    for change in history.changes:
        if change.what == "job":
            found = held.setdefault((change.tx, change.job_id), set())
            found |= {row["token"] for row in (change.old, change.new) if row is not None}
    for change in history.changes:
        if change.what == "job":
            yield from _guarded(change, tokens)
            continue
        if change.attempt is None:
            continue
        token = tokens.get((change.job_id, change.attempt))
        if token is None or token not in held.get((change.tx, change.job_id), set()):
            what = f"job {change.job_id}: {change.kind or ''} row in {change.what} of attempt {change.attempt}"
            yield Broken(promise=2, what=f"{what}, which did not hold the lease")


def _guarded(change: Change, tokens: dict[tuple[int, int], str]) -> Iterator[Broken]:
    old, new = change.old, change.new
    if old is None or new is None:
        return
    if old["token"] and new["token"] and old["token"] != new["token"]:
        yield Broken(promise=2, what=f"job {change.job_id}: a token was replaced while it held")
    if new["checkpoint"] and new["checkpoint"] != old["checkpoint"]:
        attempt = int(new["checkpoint"]["prefix"].rpartition("/")[2].partition("-")[0])
        if tokens.get((change.job_id, attempt)) != old["token"]:
            yield Broken(promise=2, what=f"job {change.job_id}: attempt {attempt} named a checkpoint without the lease")
    before, after = Status(old["status"]), Status(new["status"])
    if before is not after and after not in TRANSITIONS[before]:
        yield Broken(promise=2, what=f"job {change.job_id} went from {before.value} to {after.value}")


def _nothing_after_the_end(history: History) -> Iterator[Broken]:
    ends = {(c.tx, c.job_id) for c in history.changes if c.what == "job" and _ends(c)}
    for change in history.changes:
        if change.what != "job" or change.old is None or (change.tx, change.job_id) in ends:
            continue  # the end itself may be several updates of one transaction
        if reopened(history, change) or is_gc_s_own(history, change):
            continue
        if Status(change.old["status"]).is_terminal:
            what = "was removed" if change.new is None else "changed"
            yield Broken(promise=3, what=f"job {change.job_id} {what} after it was {change.old['status']}")
    for job_id, at in history.cancelled.items():
        again = min((act.asked_at for act in reopenings_of(history, job_id) if act.asked_at > at), default=None)
        later = [a for a in history.attempts if a.job_id == job_id and a.started_at > at]
        started = [a.attempt for a in later if again is None or a.started_at < again]
        if started:
            yield Broken(promise=3, what=f"job {job_id} was cancelled, and attempt {started[0]} started afterwards")
        if again is not None:
            continue
        status = history.jobs.get(job_id, {}).get("status")
        if status not in (Status.CANCELLED, Status.SUCCEEDED):  # it may have been done at that moment
            yield Broken(promise=3, what=f"job {job_id} was cancelled and is {status}")


def _leases(history: History) -> dict[str, dt.datetime]:
    """By token, until when each attempt held its lease as its job's row said last."""
    rows = [change.new for change in history.changes if change.what == "job" and change.new is not None]
    return {row["token"]: _time(row["lease_expires_at"]) for row in rows if row["token"]}


def _living(history: History) -> Iterator[Broken]:
    """An attempt was ended as lost while it held its lease and its node served on, or though no fault had met it."""
    leases = _leases(history)
    for attempt in history.attempts:
        if attempt.reason != "worker_lost" or attempt.ended_at is None:
            continue
        name = f"attempt {attempt.attempt} of job {attempt.job_id}"
        over = max(leases.get(attempt.token, attempt.started_at), attempt.lease_expires_at or attempt.started_at)
        silent = attempt.message.startswith(
            f"{attempt.node} was silent"
        )  # else it is a gang's other card, or a restart
        if silent and over > attempt.ended_at:
            left = (over - attempt.ended_at).total_seconds()
            yield Broken(promise=4, what=f"{name} was ended as lost {left:.1f} s before its lease was over")
        if not _met_a_fault(history, attempt, attempt.ended_at):
            yield Broken(promise=4, what=f"{name} was ended as lost, and no fault had met {attempt.node}")


def _met_a_fault(history: History, attempt: AttemptRow, end: dt.datetime) -> bool:
    """Whether it was hit, or its box, its cards, its row or the database were away while it ran or a lease before."""
    if any((hit.job_id, hit.attempt) == (attempt.job_id, attempt.attempt) for hit in history.hits):
        return True
    settle, cards = dt.timedelta(seconds=history.lease_s), {attempt.node, *attempt.cards}
    places = {None, *cards, *(card.partition(":")[0] for card in cards)}
    return any(
        window.job in (None, attempt.job_id)
        and window.box in places
        and window.start < end
        and window.end + settle > attempt.started_at
        for window in history.windows
    )


def _noticed(history: History) -> Iterator[Broken]:
    leases = _leases(history)
    for attempt in history.attempts:
        name = f"attempt {attempt.attempt} of job {attempt.job_id}"
        if attempt.ended_at is None:
            yield Broken(promise=4, what=f"{name} never ended")
        elif attempt.reason == "worker_lost" and attempt.token in leases:
            over = max(leases[attempt.token], attempt.lease_expires_at or attempt.started_at)
            late = (attempt.ended_at - over).total_seconds() - _away(history, attempt, over, attempt.ended_at)
            if late > NOTICE_SLACK_S:
                yield Broken(promise=4, what=f"{name} was noticed {late:.1f} s after its lease was over")


def _away(history: History, attempt: AttemptRow, start: dt.datetime, end: dt.datetime) -> float:
    """Seconds between two times in which no node could notice: the database was away, or every box was, or somebody
    held the job's row.

    Each outage lasts a lease longer: living supervisors are let to beat first, and a box has to start.
    """
    settle, tick = dt.timedelta(seconds=history.lease_s), dt.timedelta(seconds=0.25)
    mine = [w for w in history.windows if w.job in (None, attempt.job_id)]
    windows = [w for w in mine if w.start < end and w.end + settle > start]
    total, now = 0.0, start
    while windows and now < end:
        away = {w.box for w in windows if w.start <= now < w.end + settle}
        total += tick.total_seconds() if None in away or (history.boxes and away >= history.boxes) else 0.0
        now += tick
    return total


def _left(history: History) -> Iterator[Broken]:
    """No process of an attempt was seen long after the attempt's end."""
    attempts = {run_mark(attempt.token): attempt for attempt in history.attempts}
    for seen in history.sightings:
        attempt = attempts.get(seen.run)
        if attempt is None or attempt.ended_at is None or seen.at < attempt.ended_at:
            continue
        left = _last_seen(history, attempt, seen.at, attempt.ended_at)
        if left > LEFT_S:
            what = (
                f"process {seen.pid} of attempt {attempt.attempt} of job {attempt.job_id} was there {left:.0f} s later"
            )
            yield Broken(promise=6, what=what)


def _last_seen(history: History, attempt: AttemptRow, seen: dt.datetime, since: dt.datetime) -> float:
    """Seconds from a time until a process was seen at last, but for those in which its box could end none."""
    box = attempt.node.partition(":")[0]
    mine = [w for w in history.windows if w.job is None]
    faults = [w for w in mine if w.box is None or w.box.partition(":")[0] == box]
    return (seen - since).total_seconds() - _covered(faults, since, seen)


def _covered(windows: list[Window], start: dt.datetime, end: dt.datetime) -> float:
    """Seconds between two times that lie in some window."""
    total, now = 0.0, start
    for window in sorted(windows, key=lambda window: window.start):
        begin, over = max(now, window.start), min(end, window.end)
        total += max(0.0, (over - begin).total_seconds())
        now = max(now, over)
    return total


def _alone(history: History) -> Iterator[Broken]:
    """A job was cancelled because somebody had asked for it, or diverged by its own loss."""
    for attempt in history.attempts:
        name = f"attempt {attempt.attempt} of job {attempt.job_id}"
        if attempt.reason == "cancelled" and attempt.job_id not in {*history.asked, *history.cancelled}:
            yield Broken(promise=9, what=f"{name} ended as cancelled, and nobody had asked for that")
        if attempt.reason == "diverged" and attempt.job_id not in history.poisoned:
            yield Broken(promise=9, what=f"{name} ended as diverged, and its loss was a number")


def _gangs(history: History) -> Iterator[Broken]:
    attempts = {(a.job_id, a.attempt): a for a in history.attempts}
    for (job_id, number), attempt in attempts.items():
        asked = history.jobs[job_id].get("spec", {}).get("resources", {}).get("cards", 1)
        wanted = asked if isinstance(asked, int) and asked > 1 else 0
        cards = attempt.cards
        hosts = {card.partition(":")[0] for card in (*cards, attempt.node)}
        if len(cards) != wanted or len(set(cards)) != wanted or len(hosts) > 1 or (cards and cards[0] != attempt.node):
            what = (
                f"attempt {number} of job {job_id} on {attempt.node} had {cards or 'no shares'} of {wanted or 1} cards"
            )
            yield Broken(promise=10, what=what)
    last: dict[str, dt.datetime] = {}
    for seen in history.sightings:
        last[seen.run] = max(seen.at, last.get(seen.run, seen.at))
    for hit in history.hits:
        attempt = attempts.get((hit.job_id, hit.attempt))
        if attempt is None or attempt.ended_at is None:
            continue  # one that never ended is found elsewhere
        name = f"attempt {hit.attempt} of job {hit.job_id}"
        if hit.rank:
            left = _last_seen(history, attempt, last.get(run_mark(attempt.token), hit.at), hit.at)
            if left > RANK_S:
                yield Broken(promise=10, what=f"{name} had a process {left:.0f} s after one of its ranks was killed")
        elif hit.final:
            late = (attempt.ended_at - hit.at).total_seconds() - _away(history, attempt, hit.at, attempt.ended_at)
            if late > history.lease_s + NOTICE_SLACK_S:
                promise = 10 if attempt.cards else 4
                yield Broken(promise=promise, what=f"{name} ended {late:.1f} s after its node was killed")


def _resumed(history: History) -> Iterator[Broken]:
    """An attempt that ended well, or has told a step, began where the newest stored checkpoint was, unless a result was
    taken over."""
    taken = {(c.job_id, c.attempt) for c in history.changes if c.what == "events" and c.kind == "ready"}
    stepped = {(c.job_id, c.attempt) for c in history.changes if c.what == "metrics"}
    resumed = {
        (a.job_id, a.attempt): a for a in history.attempts if a.reason == "ok" or (a.job_id, a.attempt) in stepped
    }
    for change in history.changes:
        if change.what != "job" or change.new is None or not change.new["checkpoint"]:
            continue
        key = (change.job_id, change.new["attempt"])
        starts = change.new["status"] == Status.RUNNING and _status(change.old) is Status.QUEUED
        if not starts or key not in resumed or key in taken or change.new["checkpoint"]["prefix"] in history.torn:
            continue
        kept, began = change.new["checkpoint"]["step"], resumed[key].resumed_from_step or 0
        if began < kept:
            what = f"attempt {key[1]} of job {key[0]} began at step {began}, a checkpoint of step {kept} was stored"
            yield Broken(promise=4, what=what)


def _in_turn(history: History) -> Iterator[Broken]:
    """By the list that its row had at the end: who was let go by an edit has none."""
    first: dict[tuple[int, str], int] = {}  # when a job first had a status
    for place, change in enumerate(history.changes):
        if change.what == "job" and change.new is not None:
            first.setdefault((change.job_id, change.new["status"]), place)
    for job_id, job in history.jobs.items():
        started, spec = first.get((job_id, Status.RUNNING.value)), job.get("spec", {})
        over = [s for s in Status if s.is_terminal] if spec.get("after_any") else [Status.SUCCEEDED]
        for before in spec.get("after", ()):
            ends = [first[before, status.value] for status in over if (before, status.value) in first]
            if started is not None and (not ends or min(ends) > started):
                yield Broken(promise=15, what=f"job {job_id} started before job {before} was over")


def _in_spite(history: History) -> Iterator[Broken]:
    """Every promise is kept where nothing is done until the last fault is over."""
    for operation in unshown(history.changes, history.spans):
        yield Broken(promise=0, what=f"no {operation} succeeded while a fault was active")


def _nothing_failed(history: History) -> Iterator[Broken]:
    for attempt in history.attempts:
        poisoned = attempt.reason == "diverged" and attempt.job_id in history.poisoned
        if attempt.reason is not None and attempt.reason not in HARMLESS and not poisoned:
            what = f"attempt {attempt.attempt} of job {attempt.job_id} ended as {attempt.reason}"
            yield Broken(promise=7, what=what)
        if attempt.reason == "gpu_error" and attempt.node.partition(":")[0] not in history.bad:
            yield Broken(promise=8, what=f"attempt {attempt.attempt} of job {attempt.job_id} met a bad card too many")
    for job_id, job in history.jobs.items():
        if job["status"] == Status.FAILED and job_id not in history.poisoned:
            lab = job["reason"] is not None and OUTCOMES[Reason(job["reason"])].blames is not None
            yield Broken(promise=8 if lab else 7, what=f"job {job_id} failed: {job['reason']} {job['message']}")
    killed = Counter(a.reason for a in history.attempts)["killed"]
    if killed > history.trainers_killed:
        what = f"{killed} trainers seemed to be killed, {history.trainers_killed} were"
        yield Broken(promise=7, what=what)


def _time(value: str | dt.datetime) -> dt.datetime:
    return value if isinstance(value, dt.datetime) else dt.datetime.fromisoformat(value)
