"""The values that cross the store's face: what is submitted, claimed, reported and finished."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Method, Need, Parallel, Roomy, Ways
from loractl.common.job.status import Stage, Status
from loractl.common.job.sweep import RungPoint, rung_step
from loractl.common.placement.gangs import GangShare

if TYPE_CHECKING:
    from loractl.common.job.spec import (
        JobSpec,  # pydantic's models take 80 ms to build, and a command that only reads jobs needs none
    )
    from loractl.common.memory.fit import MemoryPlan

HELD_OUT_LOSS = "held_out_loss"
"""The metric with the tuned model's loss in the final evaluation, in nats a token."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What submit writes: the checked spec, where its data are, and what it is predicted to need."""

    spec: JobSpec
    user: str
    data: dict[str, Any]
    plan: MemoryPlan
    methods: tuple[Method, ...]  # permitted ones, the preferred first
    adjustment: Adjustment = field(default_factory=Adjustment)  # to begin with
    ways: Ways = field(default_factory=Ways)  # on how many cards it may run
    purpose: str = ""  # for the history, like: to reproduce job 12

    @property
    def first_need(self) -> int | None:
        """Bytes that it waits for at first: LoRA's need while the job has patience for it. None: not known."""
        patient = bool(self.spec.lora_patience) and self.methods == (Method.LORA, Method.QLORA)
        return self.ways.bound((Method.LORA,) if patient else self.methods, self.plan.need)


@dataclass(frozen=True, kw_only=True)
class Amendment:
    """What edit, and retry with changes, write of a job that was submitted before."""

    job_id: int
    seen: tuple[Status, int, dict[str, Any]]  # status, attempt and spec as they were when the change was checked
    submission: Submission  # its spec, data and need from now on
    replanned: bool  # False: what decides its memory is as before, and so is what was learned of it
    new_batch: bool = False  # the pieces that out-of-memory has left are another batch's
    text: str  # each key with both values, for the history


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint in the artifact store that a later attempt may go on from."""

    step: int
    prefix: str
    manifest_sha256: str | None = None  # None: an earlier version has stored it

    @classmethod
    def read(cls, column: Mapping[str, Any] | None) -> StoredCheckpoint | None:
        """What a row names."""
        if column is None:
            return None
        return cls(step=column["step"], prefix=column["prefix"], manifest_sha256=column.get("manifest_sha256"))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to run one attempt, until the lease ends."""

    job_id: int
    attempt: int
    token: str
    user: str
    spec: JobSpec
    data: dict[str, Any]
    method: Method
    vram_planned: int | None
    submitted_at: dt.datetime  # of the job
    vram_reserved: int | None = None  # bytes of the card that are the attempt's; None: no limit
    seconds_predicted: float | None = None  # of this attempt; None: nothing is known
    method_why: str = ""  # why this one of several; empty where the job permits only one
    adjustment: Adjustment = field(default_factory=Adjustment)
    changes: tuple[str, ...] = ()  # what out-of-memory has changed so far, in words
    checkpoint: StoredCheckpoint | None = None
    result_host: str | None = None  # the box that is said to hold its finished result
    sweep_id: int | None = None  # the sweep that the job belongs to
    rungs: tuple[float, ...] = ()  # shares of its steps at which it may be stopped as one of the sweep's losers
    parallel: Parallel = Parallel.NONE
    shares: tuple[GangShare, ...] = ()  # of each card, the claiming node's first


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an attempt is. A field that is None leaves the row's value as it is."""

    stage: Stage | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    eta_spread_seconds: float | None = None
    evaluated: int | None = None  # rows and answers of base and tuned together
    to_evaluate: int | None = None
    need: Need | None = None  # a better plan, from the data's own lengths or a trace
    roomy: Roomy | None = None  # the same of what it may have beyond that
    running: int | None = None  # bytes of this attempt by that plan, where it was given the room
    vram_peak: int | None = None
    vram_allocated: int | None = None
    vram_process: int | None = None
    base_bytes: int | None = None  # of the device, by the loaded base alone
    resumed_from_step: int | None = None
    prepared_s: float | None = None  # from the attempt's start to its first step
    trained_s: float | None = None  # in its steps so far
    trained_steps: int | None = None
    neighbours: float | None = None  # other jobs on its card in these steps, on average
    adjustment: Adjustment | None = None  # of the run to what its memory allows, kept for later attempts
    result_host: str | None = None  # the box that holds a finished result; empty: none does
    withdrawn: str | None = None  # the prefix of the stored checkpoint that no attempt goes on from any more
    metrics: tuple[tuple[int, str, float], ...] = ()  # step, name, value
    events: tuple[tuple[str, str], ...] = ()  # kind, text
    kept: tuple[tuple[str, str], ...] = ()  # files in the box's cache for later jobs: key, sha256
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The database's answer to a heartbeat."""

    accepted: bool  # False: the lease is lost, stop at once and write nothing
    recorded: bool = True  # False: somebody has the job's row locked; a later beat brings what is new
    cancel_requested: bool = False
    preempted_by: int | None = None  # a job of higher priority that needs the room
    pruned: str | None = None  # why its sweep stops it at the rung that this beat reached
    time_limit: float | None = None  # seconds of an attempt, as the job's spec has it now


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """Verified artifacts of a successful attempt."""

    adapter_uri: str
    report_uri: str
    adapter_size: int
    adapter_sha256: str
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True)
class Left:
    """No job for this card: one would fit, but the rule gives it to another card that has not taken it yet."""

    nodes: frozenset[str]  # empty: another node was faster, look again


@dataclass(frozen=True, kw_only=True)
class FleetTurn:
    """A node's turn to do what concerns the whole fleet."""

    settling: bool  # the database was away: living workers come first, no lease is ended yet


@dataclass(frozen=True, kw_only=True)
class BoxIdentity:
    """What distinguishes a box from another one with the same name; None: not known, as of an older version."""

    instance: str | None = None  # drawn once in its LORACTL_HOME
    machine: str | None = None
    boot: str | None = None  # of the machine since its last start, and of this very home


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a node found when it was about to serve its device."""

    given_back: tuple[int, ...] = ()  # jobs that an earlier node of this very boot left running
    seen_at: dt.datetime | None = None  # a node of another boot of this machine was seen then: it may be alive
    server: str | None = None  # that node, if it serves this card under another name


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """What a node says of its device. Bytes."""

    node: str
    host: str
    gpu: str
    device_name: str
    kind: str
    total: int
    outside_bytes: int = 0
    outside: list[dict[str, Any]] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)  # by job_id
    margin: int = 0
    max_jobs: int = 1
    user_limit: int | None = None
    keeps_jobs: bool = False  # its jobs yield to no shorter ones
    labels: dict[str, str] = field(default_factory=dict)
    load: int | None = None
    temperature: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    instance: str | None = None
    machine: str | None = None
    boot: str | None = None
    draining: bool = False
    gangs: bool = False  # its worker serves jobs on several cards
    fault: str | None = None  # why nothing can run on it, with the next step
    self_test: dict[str, Any] | None = None
    until: dt.datetime | None = None  # when its worker stops by itself
    window_s: float | None = None  # from its worker's start until then


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A filter for jobs; with nothing set it takes all."""

    user: str | None = None
    label: tuple[str, str] | None = None  # key, value
    name: str | None = None
    status: Status | None = None

    @property
    def is_set(self) -> bool:
        return bool(self.user or self.label or self.name or self.status)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A part of a list."""

    limit: int = 50
    after: int | None = None  # the last job of the part before it; None: from the start


@dataclass(frozen=True, kw_only=True)
class Over:
    """Of some jobs: those that the database knows, those that need no files, and attempts that left no kept result.

    An ended attempt is never run again and never becomes a result, even if its job continues.
    """

    known: frozenset[int]
    jobs: frozenset[int]
    attempts: frozenset[tuple[int, int]]  # job_id, attempt


@dataclass(frozen=True, kw_only=True)
class PastJob:
    """A job that ended long ago. Sizes in the database, in bytes, roughly."""

    job_id: int
    name: str
    user: str
    ended_at: dt.datetime
    points_size: int  # values of single steps
    size: int  # all of it


@dataclass(frozen=True, kw_only=True)
class PastUse:
    """What one user's jobs with the same labels had of one card in one hour, or in all for what is not kept apart."""

    hour: dt.datetime | None = None  # its start
    user: str = ""
    node: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    card_hours: float
    gib_hours: float
    lost_hours: float = 0.0  # of the card hours, for steps that no checkpoint has kept
    waited_hours: float = 0.0  # by jobs, before attempts that began in it
    jobs: int = 0  # that ended in it


def rung_points(claim: Claim, progress: Progress) -> list[RungPoint]:
    """The evaluations of a heartbeat that are at a rung of the claim's sweep."""
    every, total = claim.spec.training.eval_steps, progress.total_steps
    if every is None or total is None:
        return []
    losses = {step: loss for step, name, loss in progress.metrics if name == "eval_loss" and math.isfinite(loss)}
    steps = [(rung, rung_step(rung, every, total)) for rung in claim.rungs]
    return [RungPoint(rung=rung, step=step, loss=losses[step]) for rung, step in steps if step in losses]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What became of a try to send. `sent` false without `again`: another try could not help."""

    sent: bool = False
    again: bool = False
    why: str = ""  # in our words, never the receiver's
    after_s: float | None = None  # the pause that the receiver asks for


@dataclass(frozen=True, kw_only=True)
class StuckMessages:
    """Messages to one channel that nobody takes (no outcome), or that were given up."""

    channel: str
    count: int
    at: dt.datetime  # when the oldest of those that wait was written; of the others the last was given up
    outcome: str | None


@dataclass(frozen=True, kw_only=True)
class ChannelTraffic:
    """The messages of one channel: those that are due, and what became of the others within a day."""

    channel: str
    waiting: int
    oldest: dt.datetime | None  # when the oldest of those that wait was written
    sent: int
    given_up: int
