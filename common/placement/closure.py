"""Closures: which card or box fails the jobs of several people, and so is to take no more of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loractl.common.job.status import BLAMED, Blamed, Reason

GPU_ERRORS = 2
"""A card is closed after this many gpu_errors in a row."""

OTHER_FAILURES = 3
"""A card or a box is closed after this many of the lab's other failures in a row."""

REMEMBERED_S = 24 * 3600.0
"""An older failure says nothing about a card any more."""

ONE_LOSS_S = 60.0
"""Lost workers and killed trainers within this time had one cause: a power cut or a pkill ends every job of a box."""


@dataclass(frozen=True, kw_only=True)
class CardFailure:
    """An attempt that a failure of the lab ended."""

    node: str
    reason: Reason
    user: str
    job_id: int
    sweep_id: int | None
    at: dt.datetime
    message: str

    @property
    def host(self) -> str:
        return self.node.rpartition(":")[0]

    @property
    def origin(self) -> tuple[str, str, int]:
        """All jobs of one sweep count as one: they may be the cause themselves."""
        return (self.user, "job", self.job_id) if self.sweep_id is None else (self.user, "sweep", self.sweep_id)


@dataclass(frozen=True, kw_only=True)
class Closure:
    """A card or a box that is to take no more jobs."""

    target: str  # host:index, or a host
    reason: str  # for people


def closure(node: str, failures: Sequence[CardFailure]) -> Closure | None:
    """Whether the failures say that this card, or its box, is bad.

    `failures`: those on all cards that have ended no attempt well since, at most REMEMBERED_S old.
    """
    host = node.rpartition(":")[0]
    errors = [f for f in failures if f.node == node and f.reason is Reason.GPU_ERROR]
    others = [f for f in failures if f.host == host and f.reason is not Reason.GPU_ERROR]
    here = [f for f in others if f.node == node and BLAMED.get(f.reason) is Blamed.CARD]
    for target, found, limit in (
        (node, errors, GPU_ERRORS),
        (node, here, OTHER_FAILURES),
        (host, others, OTHER_FAILURES),
    ):
        counted = _independent(found)
        if len(counted) >= limit and not _follows_the_jobs(target, counted, failures):
            return Closure(target=target, reason=_reason(target, counted))
    return None


def _independent(failures: Iterable[CardFailure]) -> list[CardFailure]:
    """One failure for each origin, and one for those that were lost together."""
    counted: list[CardFailure] = []
    seen: set[tuple[str, str, int]] = set()
    lost: dt.datetime | None = None  # when the newest group of those lost together began
    for failure in sorted(failures, key=lambda f: (f.at, f.job_id)):
        together = False
        if failure.reason in (Reason.WORKER_LOST, Reason.KILLED):
            together = lost is not None and (failure.at - lost).total_seconds() <= ONE_LOSS_S
            lost = lost if together else failure.at
        if failure.origin not in seen and not together:
            counted.append(failure)
        seen.add(failure.origin)
    return counted


def _follows_the_jobs(target: str, counted: Sequence[CardFailure], failures: Sequence[CardFailure]) -> bool:
    """Whether the same happens elsewhere too, so that this card or box is not at fault.

    It is one user's fault if only that user's jobs fail, and fail in the same way elsewhere; it is the store's if it
    fails several boxes.
    """
    reasons, users = {f.reason for f in counted}, {f.user for f in counted}
    elsewhere = [f for f in failures if target not in (f.node, f.host) and f.reason in reasons]
    if reasons == {Reason.STORE_FAILED}:
        return bool(elsewhere)
    return len(users) == 1 and any(f.user in users for f in elsewhere)


def _reason(target: str, counted: Sequence[CardFailure]) -> str:
    """For people: what happened to whom, and the way back. One line."""
    names = sorted({f.reason.value for f in counted})
    what = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    jobs = [str(f.job_id) for f in counted]
    who = f"{', '.join(jobs[:-1])} and {jobs[-1]}"
    said = " ".join(counted[-1].message.split())
    return f"{what} in jobs {who}, the last: {said[:90]}; check it, then loractl undrain {target}"
