"""The fleet's rows as the placement rule sees them: cards with what runs there, and waiting jobs."""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loractl.common.job.method import Method, Need, Ways
from loractl.common.job.status import Status
from loractl.common.placement.cards import Card, Occupant, Reservation, Yields, largest_gpu
from loractl.common.placement.closure import CardFailure
from loractl.common.placement.lines import QueueKey, Waiting
from loractl.common.placement.rule import Decision, Placement, turns_in
from loractl.common.placement.shares import Allowance

from .tables import ASKED_TO_STOP, DrainOrder, Job, Node

NODE_STALE_S = 60.0
"""A node that was not seen for this long counts as offline."""


LEAVES_IN_S = 10.0
"""How long a job that was asked to end takes at most, about: it ends its step and writes a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class GivingWay:
    """Whether and when running jobs yield to much shorter ones, see placement/preemption.py."""

    is_on: bool = True
    least_s: float | None = None  # the lab's own time undisturbed
    jobs: Mapping[int, Yields] = field(default_factory=dict)  # those that could

    def on(self, cards: Iterable[Card]) -> list[Card]:
        """The cards with what decides it."""
        return [
            replace(card, running=tuple(replace(one, yields=self.jobs.get(one.job_id)) for one in card.running))
            for card in cards
        ]


@dataclass(frozen=True, kw_only=True)
class FleetView:
    """The whole fleet at one moment, and what the rule would do with it."""

    now: dt.datetime
    nodes: dict[str, Node]
    cards: dict[str, Card]  # with the jobs that the next round asks to stop as if it had
    drains: dict[str, DrainOrder]  # by host or card
    running: dict[int, Job]
    charges: dict[str, float]  # GiB hours by user
    firsts: tuple[Waiting, ...]  # of what waits on: of each line the first and the oldest
    decisions: tuple[Decision, ...]  # what starts next, and for which job a card is kept
    round_at: dt.datetime | None = None  # when a node last went round for the fleet; None: none ever did
    failures: tuple[CardFailure, ...] = ()  # of a day, on cards that have ended no attempt well since
    allowed: Mapping[str, Allowance] = field(default_factory=dict)  # of users with a quota
    by_share: bool = False  # in the order of before, see `turns_by_share`
    giving_way: GivingWay = field(default_factory=GivingWay)
    awaited: Mapping[int, Job] = field(default_factory=dict)  # jobs after which the jobs asked about start

    @functools.cached_property
    def largest(self) -> int:
        """See largest_gpu."""
        return largest_gpu(self.cards.values())

    @functools.cached_property
    def turn(self) -> Callable[[Waiting], tuple[float, ...]]:
        """Orders jobs as the rule tries them, the first one least."""
        return turns_in(self.by_share, self.charges, self.now)

    @functools.cached_property
    def placed(self) -> dict[int, Placement]:
        """What starts, by job."""
        return {one.placed.job.job_id: one.placed for one in self.decisions if one.placed is not None}

    @functools.cached_property
    def starting(self) -> dict[str, list[Waiting]]:
        """What starts on each card, in the order in which that is decided."""
        found: dict[str, list[Waiting]] = {}
        for placed in self.placed.values():
            for share in placed.shares:
                found.setdefault(share.node, []).append(placed.job)
        return found

    @functools.cached_property
    def suiting(self) -> dict[Hashable, frozenset[str]]:
        """The cards that a line's jobs could take, as far as this view was asked."""
        return {}

    @functools.cached_property
    def kept(self) -> dict[str, Reservation]:
        """For which job a card is kept, by card."""
        reserved = [one.reserved for one in self.decisions if one.reserved is not None]
        return {kept.node: one for one in reserved for kept in one.cards}

    @functools.cached_property
    def declined(self) -> dict[int, Placement]:
        """What jobs could have next to others, for which a card is kept that will be empty, by job."""
        return {one.declined.job.job_id: one.declined for one in self.decisions if one.declined is not None}

    def cards_of(self, job_id: int) -> list[str]:
        """The cards on which a job runs, by name: more than one where several share it."""
        return [name for name, card in self.cards.items() if any(job.job_id == job_id for job in card.running)]

    def drain_of(self, node: str) -> DrainOrder | None:
        return self.drains.get(node) or self.drains.get(node.rpartition(":")[0])


OCCUPANT = (
    Job.job_id, Job.user, Job.eta_seconds, Job.priority, Job.preemptible, Job.started_at, Job.preempted_by,
    ASKED_TO_STOP, Job.waits_from,
)  # fmt: skip
"""What a card shows of a running job, besides its bytes there."""


def card_of(node: Node, running: Sequence[Any], now: dt.datetime, drained: Collection[str]) -> Card:
    """One node's card. `running`: rows of `occupants`, of this card; `drained`: hosts and cards."""
    return Card(
        node=node.node,
        total=node.total,
        outside=node.outside_bytes,
        margin=node.kept_free,
        running=tuple(
            Occupant(
                job_id=row.job_id,
                user=row.user,
                reserved=node.total if row.vram_reserved is None else row.vram_reserved,  # an older version's job
                used=int(node.used.get(str(row.job_id), 0)),
                priority=row.priority,
                preemptible=row.preemptible,
                ends=_end_of(row, now),
                began=row.started_at,
                since=row.waits_from,
                gives_way_to=row.preempted_by,
            )
            for row in running
        ),
        max_jobs=node.max_jobs,
        labels=frozenset(node.labels.items()),
        open=_is_open(node, now, drained),
        processor=node.kind == "cpu",
        model=node.device_name,
        gangs=bool(node.gangs) and not node.gpu.startswith("MIG-"),  # slices can't talk to each other
        user_limit=node.user_limit,
        bf16=takes_bf16(node.self_test),
        left_s=None if node.until is None else (node.until - now).total_seconds(),
        window_s=None if node.until is None else node.window_s,
    )


_AMPERE = 8
"""The first generation (compute capability 8.0) that has bfloat16."""


def takes_bf16(self_test: Mapping[str, Any] | None) -> bool | None:
    """Whether a device takes bfloat16 under training.dtype auto, by what it showed; None: it showed nothing yet."""
    found = self_test or {}
    if (told := found.get("bf16")) is not None:  # a processor
        return bool(told)
    known = re.fullmatch(r"(\d{1,3})\.\d{1,3}", found.get("capability") or "", re.ASCII)
    return None if known is None else int(known[1]) >= _AMPERE


def _end_of(row: Any, now: dt.datetime) -> dt.datetime | None:
    """When a running job is expected to end: soon where it was asked to."""
    asked = row.preempted_by is not None or row.cancel_requested
    known = [seconds for seconds in (row.eta_seconds, LEAVES_IN_S if asked else None) if seconds is not None]
    return now + dt.timedelta(seconds=min(known)) if known else None


def _is_open(node: Node, now: dt.datetime, drained: Collection[str]) -> bool:
    """Whether the node is online, works, and nobody keeps it empty."""
    online = (now - node.seen_at).total_seconds() <= NODE_STALE_S
    works = node.fault is None and not node.draining and (node.until is None or node.until > now)
    return online and works and node.node not in drained and node.host not in drained


def is_ready(job: Job, now: dt.datetime) -> bool:
    """Whether a claim may take the job, whatever it needs: `tables.READY` of a row."""
    return job.status is Status.QUEUED and not job.held and job.awaits is None and not paused(job, now)


def paused(job: Job, now: dt.datetime) -> bool:
    """Whether the job waits out a pause: after a failed attempt, or for a newer worker."""
    return job.not_before is not None and job.not_before > now


def waiting_of(row: Mapping[str, Any], now: dt.datetime) -> Waiting:
    """A ready job's row as the rule sees it. QLoRA is not permitted while it waits for LoRA. `again` is no column of
    it: the lines read it with the row of a job on several cards.
    """
    ways = Ways.read(row.get("gangs"))
    patient = row["lora_until"] is not None and row["lora_until"] > now
    return Waiting(
        job_id=row["job_id"],
        user=row["user"],
        priority=row["priority"],
        since=row["submitted_at"],
        methods=(Method.LORA,) if patient else tuple(map(Method, row["methods"])),
        need=Need(lora=row["vram_lora"], qlora=row["vram_qlora"]),
        requires=QueueKey.parse(row["queue_key"]).requires,
        only_host=row["result_host"] if row["result_until"] is not None and row["result_until"] > now else None,
        avoids=frozenset(avoided_by(row["avoids"], now)),
        bf16=row.get("begun_bf16"),
        alone=ways.alone,
        gangs=ways.gangs,
        again=row.get("again"),
        checkpoint_s=row.get("checkpoint_s"),
        left_s=row["work_left_s"],
        key=row["queue_key"],
    )


@dataclass(frozen=True, kw_only=True)
class Avoidance:
    """Why a job keeps off a card or a box, and until when."""

    reason: str
    until: dt.datetime


OLDER = "older"
"""Why a job avoids a box whose worker's loractl is too old to read it."""


def avoided_by(column: Mapping[str, Any] | None, now: dt.datetime) -> dict[str, Avoidance]:
    """What a job's row says of the cards and boxes that failed it, as far as it holds now."""
    told = {
        name: Avoidance(reason=entry["reason"], until=dt.datetime.fromisoformat(entry["until"]))
        for name, entry in (column or {}).items()
    }
    return {name: avoidance for name, avoidance in told.items() if avoidance.until > now}
