"""A run as tables, for the terminal and for docs/chaos.md."""

from __future__ import annotations

import statistics
from collections import Counter

from .acts import counts_of
from .checker import PROMISES
from .deck import DECK, SQLITE_FAULTS
from .faults import BACK_AT_LAST_S, WAIT_S
from .history import TRANSACTION_S
from .storm import GANGS, POISONED_SHARE, Outcome
from .successes import ANY_FAULT, NO_FAULT, OPERATIONS, tally


def table(outcome: Outcome) -> str:
    """Counts, recovery times, and the promises."""
    return "\n".join(
        [
            "",
            *_counts(outcome),
            "",
            *_successes(outcome),
            "",
            *_recovery(outcome),
            "",
            *_promises(outcome),
        ]
    )


def page(outcome: Outcome) -> str:
    """docs/chaos.md."""
    plan = outcome.plan
    return f"""# Chaos

After this page you know what loractl kept while a script killed, froze, disconnected and filled what it depends on.
`make chaos` runs {plan.jobs} jobs, reads the whole history, exits non-zero if one promise is broken, and writes this
page of one run. `make test-long` does the same for about a minute.

    make chaos CHAOS_JOBS={plan.jobs} CHAOS_SEED={plan.seed}

- Real parts: `loractl submit`, {plan.boxes} `loractl worker` with {plan.cards} simulated cards each, Valkey,
  PostgreSQL, and the artifact store ({outcome.disk}; one run in three uses S3), behind a proxy that cuts, slows and
  silences connections, with the logins that `loractl db roles` makes.
- A stand-in for the trainer (`tests/chaos/trainer.py`) has the real pipes, protocol, checkpoints and files. Its weights
  are a chain of hashes, so that a step too many, a step too few, or one from a torn file shows.
- A hostile login takes every lock and connection that PostgreSQL allows; the owner's psql holds a running job's row for
  longer than a lease. A box's clock jumps if Debian's libfaketime is installed.{_not_had(outcome)}
- One job in {1 / POISONED_SHARE:.0f} has a loss that is not a number. One job in {GANGS} is on two cards.
- While faults are active, people edit, hold, release, retry and tag jobs, raise priorities, queue and cancel sweeps,
  and run `loractl gc`. Long jobs hold every card at first and yield to short ones; a run in which none does fails.
- A lease is {plan.lease_s:.0f} s instead of 60 (`LORACTL_LEASE`), and what depends on it is shorter in proportion.
- The seed decides the faults, one every {plan.gap_s:.1f} s; which process is hit depends on the moment. A fault that
  finds no target within {WAIT_S:.0f} s is not counted.
- PostgreSQL's triggers write the history in the transaction of each change. `test_checker.py` shows for each promise
  that a breach is found.
- `make chaos CHAOS_DATABASE=sqlite` does the same to one box on SQLite, whose write lock another program holds for up
  to a lease and a half. A stale write within {TRANSACTION_S:.0f} s of its attempt's end would not be found.

## What was kept

{chr(10).join(_promises(outcome))}

## Counts

{chr(10).join(_counts(outcome))}

## Faults, and successes in spite of them

Operations (submits, claims, heartbeats, checkpoints, finishes) that were committed while a fault of each kind was
active anywhere in the lab; several may be active at once. A fault is active until it is healed and what it killed is
back, but at most {BACK_AT_LAST_S:.0f} s after it is healed. If one kind of operation never succeeded during a fault,
the run fails.

{chr(10).join(_successes(outcome))}

## Recovery

{chr(10).join(_recovery(outcome))}

"Noticed": from the kill or freeze to the attempt's end as `worker_lost`, outages of the database included. "Goes on":
from there to the next attempt's start, the wait for a free card included. With the product's lease of 60 s,
the first takes up to ten times as long.
"""


def _not_had(outcome: Outcome) -> str:
    lacks = ", ".join(sorted(outcome.lacks - SQLITE_FAULTS))
    return f" This run lacked: {lacks}." if lacks else ""


def _counts(outcome: Outcome) -> list[str]:
    history = outcome.history
    statuses = Counter(job["status"] for job in history.jobs.values())
    reasons = Counter(attempt.reason for attempt in history.attempts)
    ganged = [attempt for attempt in history.attempts if attempt.cards]
    gangs = [history.jobs[job_id] for job_id in sorted({attempt.job_id for attempt in ganged})]
    chained = {c.job_id for c in history.changes if c.what == "job" and c.new is not None and c.new.get("awaits")}
    rows = [
        ("jobs", f"{len(history.jobs)} ({_listed(statuses)})"),
        ("numbers that submit printed", str(len(history.printed))),
        ("submits that failed and were repeated", str(outcome.failed_submits)),
        ("attempts", f"{len(history.attempts)} ({_listed(reasons)})"),
        ("resumed from a checkpoint", str(sum(bool(a.resumed_from_step) for a in history.attempts))),
        ("finished results taken over", str(sum(c.what == "events" and c.kind == "ready" for c in history.changes))),
        ("refused stale writes", f"{outcome.refused.total()} ({_listed(outcome.refused)})"),
        ("acknowledged cancels", str(len(history.cancelled))),
        *counts_of(history),
        ("jobs on two cards", f"{len(gangs)} ({_listed(Counter(job['status'] for job in gangs))})"),
        ("attempts on two cards", f"{len(ganged)} ({_listed(Counter(a.reason for a in ganged))})"),
        ("of them resumed from a checkpoint", str(sum(bool(a.resumed_from_step) for a in ganged))),
        ("jobs that start after others", str(len(chained))),
        ("of them started by an edit, since the awaited job had failed or was cancelled", str(outcome.let_go)),
        ("single ranks killed", str(sum(hit.rank for hit in history.hits))),
        ("held after three failures of the lab, and released", str(outcome.released)),
        ("drained for failures, repaired and opened again", str(outcome.mended)),
        ("statements of a hostile login that PostgreSQL allowed", str(outcome.held)),
        ("seconds", f"{outcome.seconds:.0f}"),
    ]
    return ["| what | count |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _successes(outcome: Outcome) -> list[str]:
    """Each fault: how often it struck, and, where it lasted, what succeeded meanwhile."""
    spans = outcome.history.spans
    counts = tally(outcome.history.changes, spans)

    def row(kind: str, times: str, seconds: str) -> str:
        done = str(counts[kind].total()) if kind in counts else ""
        return f"| {kind} | {times} | {seconds} | {done} |"

    def active(kind: str) -> str:
        return f"{sum((span.end - span.start).total_seconds() for span in spans if span.kind == kind):.0f}"

    had = (kind for kind in DECK if kind not in outcome.lacks)
    kinds = [row(kind, str(outcome.faults[kind]), active(kind) if kind in counts else "") for kind in had]
    both = (row(NO_FAULT, "", ""), row(ANY_FAULT, str(outcome.faults.total()), ""))
    each = ", ".join(f"{operation} {counts[ANY_FAULT][operation]}" for operation in OPERATIONS)
    head = ["| fault | times | active, s | operations |", "| --- | --- | --- | --- |"]
    return [f"While any fault was active: {each}.", "", *head, *both, *kinds]


def _recovery(outcome: Outcome) -> list[str]:
    rows = [
        ("lost worker noticed", outcome.noticed),
        ("its job goes on elsewhere", outcome.resumed),
        ("PostgreSQL back, next heartbeat of a running job", outcome.postgres_back),
        *((f"{name} back, a job submitted then starts", times) for name, times in outcome.probes.items()),
    ]
    head = ["| from, to | times | median s | longest s |", "| --- | --- | --- | --- |"]
    return head + [
        f"| {name} | {len(times)} | {statistics.median(times):.1f} | {max(times):.1f} |"
        for name, times in rows
        if times
    ]


def _promises(outcome: Outcome) -> list[str]:
    broken = Counter(breach.promise for breach in outcome.broken)
    rows = [f"| {number} | {text} | {broken[number]} |" for number, text in PROMISES.items()]
    return ["| | promise | breaches |", "| --- | --- | --- |", *rows]


def _listed(counts: Counter) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
