"""What succeeded, and which faults were active then: a history in which all waits until the lab is whole proves little.

As Jepsen's: a fault has a beginning and an end, and what was committed between them succeeded in spite of it.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from loractl.common.job.status import Status

from .history import Change, Span

OPERATIONS = ("submit", "claim", "heartbeat", "checkpoint", "finish")

NO_FAULT, ANY_FAULT = "no fault", "any fault"


def tally(changes: Sequence[Change], spans: Sequence[Span]) -> dict[str, Counter[str]]:
    """For each kind of fault, how many of each operation succeeded while one of it was active."""
    found: dict[str, Counter[str]] = {name: Counter() for name in (NO_FAULT, ANY_FAULT)}
    for span in spans:
        found.setdefault(span.kind, Counter())
    for operation, at in _operations(changes):
        active = {span.kind for span in spans if span.start <= at <= span.end}
        for kind in (*active, ANY_FAULT if active else NO_FAULT):
            found[kind][operation] += 1
    return found


def unshown(changes: Sequence[Change], spans: Sequence[Span]) -> list[str]:
    """The operations that never succeeded while a fault was active."""
    done = tally(changes, spans)[ANY_FAULT]
    return [operation for operation in OPERATIONS if not done[operation]]


def _operations(changes: Sequence[Change]) -> Iterator[tuple[str, dt.datetime]]:
    for change in changes:
        if change.what == "job" and change.new is not None:
            for operation in _of(change.old, change.new):
                yield operation, change.at


def _of(old: dict[str, Any] | None, new: dict[str, Any]) -> Iterator[str]:
    """What a change of a job's row was; a heartbeat may carry a checkpoint."""
    if old is None:
        yield "submit"
        return
    if new["checkpoint"] and new["checkpoint"] != old["checkpoint"]:
        yield "checkpoint"
    if new["token"] and not old["token"]:
        yield "claim"
    elif new["token"] and new["lease_expires_at"] != old["lease_expires_at"]:
        yield "heartbeat"
    if new["status"] == Status.SUCCEEDED != old["status"]:
        yield "finish"
