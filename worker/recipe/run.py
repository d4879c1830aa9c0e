"""One run of the recipe: its order, its messages to the supervisor, its stop, and how much of its device it may
take.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace

import torch

from loractl.common.job.adjustment import Adjustment, adjusted, in_words
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason, Stage
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import Gauge, hold_to, limit_to
from loractl.worker.base.kept.base_cache import BaseCache
from loractl.worker.base.kept.remains import TrainingRemains
from loractl.worker.engine.engine import Engine, Session
from loractl.worker.protocol.log_lines import log_line
from loractl.worker.protocol.messages import Adjusted, GoingOn, Note, Peaks, StageChanged, Start, Told

from .kinds import TrainedKind, trained_kind
from .members import Roster


@dataclass(frozen=True, kw_only=True)
class _Share:
    order: Start
    bytes: int | None  # None: no limit


@dataclass(kw_only=True)
class DeviceLimit:
    """The limit of a process, which is reset whenever a member comes or goes. Any thread may call it.

    On a card the members' parts are added up, plus the base's bytes once the member that loaded it is gone. On a CPU a
    limit is what the box's owner grants a trainer process, so several members share it.
    """

    _shares: dict[int, _Share] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def grant(self, order: Start, limit: int | None, base_bytes: int) -> None:
        """Let a member take this much; called in its thread before it computes. `base_bytes`: of a base already
        loaded."""
        with self._lock:
            self._shares[order.job_id] = _Share(order=order, bytes=limit)
            hold_to(self.total(base_bytes), order.device, order.gpu)

    def lower(self, order: Start, limit: int | None, base_bytes: int) -> None:
        """Note that a member needs less than it was granted."""
        with self._lock:
            self._shares[order.job_id] = _Share(order=order, bytes=limit)
            limit_to(self.total(base_bytes), order.device, order.gpu)

    def take_back(self, order: Start, base_bytes: int) -> None:
        """Note that a member is gone."""
        with self._lock:
            self._shares.pop(order.job_id, None)
            if self._shares:
                limit_to(self.total(base_bytes), order.device, order.gpu)

    def total(self, base_bytes: int) -> int | None:
        """Bytes for all current members; None: no limit."""
        parts = [share.bytes for share in self._shares.values() if share.bytes is not None]
        if len(parts) < len(self._shares) or not parts:
            return None
        orders = [share.order for share in self._shares.values()]
        if orders[0].device == "cpu":
            return max(parts)
        return sum(parts) + (base_bytes if all(order.joins for order in orders) else 0)


SIGN_S = 10.0
"""Seconds between two signs of life."""


class Stopped(Exception):
    """The supervisor asked to stop."""


@dataclass(kw_only=True)
class Run:
    """What a step of the recipe may use: the order, where to report, and whether to stop."""

    order: Start
    tell: Callable[[Told], None]
    stop: threading.Event = field(default_factory=threading.Event)
    save_on_stop: threading.Event = field(default_factory=threading.Event)
    base_cache: BaseCache = field(default_factory=BaseCache)  # with the base, if this process has loaded it before
    part: InitVar[Session | None] = None  # of the process's engine; None: it has its own engine
    roster: Roster = field(default_factory=Roster)
    device_limit: DeviceLimit = field(default_factory=DeviceLimit)
    remains: TrainingRemains = field(init=False)
    failed_aside: bool = False  # what ended it happened in another process
    card_failed: bool = False  # the card refused something: from then on it may refuse everything from this process
    stages: list[Stage] = field(default_factory=list)  # stages begun so far
    adjustment: Adjustment = field(init=False)  # what out-of-memory has changed so far
    changes: list[str] = field(init=False)  # the same in words, one for each reduction
    gauge: Gauge = field(init=False)
    _signed: float = field(default_factory=time.monotonic)  # when it last reported to be at work
    _session: Session | None = field(init=False)
    _own: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self, part: Session | None) -> None:
        self._session = part
        self.adjustment = self.order.adjustment
        self.changes = list(self.order.changes)
        self.gauge = Gauge(self.order.device, self.order.gpu)
        self.remains = TrainingRemains(order=self.order)

    @property
    def session(self) -> Session:
        """The engine session for all computation. Its own exists until `close`."""
        if self._session is None:
            self._session = self._own.enter_context(Engine().session(torch.device(self.order.device)))
        return self._session

    def close(self) -> None:
        """End all computation."""
        self._own.close()

    @property
    def spec(self) -> JobSpec:
        """The job as it runs: its spec, adjusted to the memory."""
        return adjusted(self.order.spec, self.adjustment)

    @property
    def kind(self) -> TrainedKind:
        """What it learns to do."""
        return trained_kind(self.order.spec)

    @property
    def cards(self) -> int:
        """How many cards share the job."""
        return max(1, len(self.order.ranks))

    @property
    def on_gpu(self) -> bool:
        return self.order.device == "cuda"

    def stage(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.tell(StageChanged(job_id=self.order.job_id, stage=stage))

    def note(self, kind: str, text: str, resumed_from_step: int | None = None) -> None:
        """Add a line to the job's history, and to its log."""
        self.say(text)
        self.tell(Note(job_id=self.order.job_id, kind=kind, text=text, resumed_from_step=resumed_from_step))

    def phase(self, text: str) -> None:
        """Report what begins now and may take long without another sign of life."""
        self.note("phase", text)

    def say(self, text: str) -> None:
        """Write a line only into the job's log."""
        self.write(log_line(self.stages[-1].value if self.stages else "starting", text))

    def write(self, lines: str) -> None:
        """Add lines, with their ends, to the job's log."""
        self.roster.write(self.order.job_id, lines, self.tell)

    def peaks(self) -> Peaks:
        """The job's peaks for its row: in a shared process they are not its own."""
        found = self.session.run(self.gauge.look)
        return Peaks(held=found.held) if self.roster.shared else found

    def adjust(self, adjustment: Adjustment) -> None:
        """Continue with less memory."""
        self.changes.append(in_words(self.order.spec, self.adjustment, adjustment, cards=self.cards))
        self.note("memory", self.changes[-1])
        self.adjustment = adjustment
        self.tell(Adjusted(job_id=self.order.job_id, adjustment=adjustment))

    def adjust_evaluation(self, batch: int) -> None:
        """Evaluate fewer rows at once."""
        self.adjust(replace(self.adjustment, eval_batch=batch))

    def check_stop(self) -> None:
        """Call it repeatedly in long work. Raises Stopped, and what require_base raises."""
        if self.stop.is_set():
            raise Stopped
        self._require_whole()
        self.go_on()

    def require_base(self) -> None:
        """Call it before anything trained or measured here counts: another job here may have changed the base.

        Raises TrainingFailed(host_lost), then and from then on, for all jobs of the process.
        """
        if self.roster.met_by(self.order.job_id) and self.roster.lost is None:
            self.roster.lost = self.base_cache.change()
        self._require_whole()

    def _require_whole(self) -> None:
        if self.roster.lost is not None:
            raise TrainingFailed(Reason.HOST_LOST, f"it shared its trainer with other jobs, and {self.roster.lost}")

    def go_on(self) -> None:
        """Report from time to time that the job is at work: a job that is silent for long is taken to hang."""
        if (now := time.monotonic()) >= self._signed + SIGN_S:
            self._signed = now
            self.tell(GoingOn(job_id=self.order.job_id))

    def between(self) -> None:
        """Call it within a long piece of work: it lets other jobs of the process go first. Raises Stopped."""
        self.check_stop()
        self.session.pause()

    def hold_to(self, limit: int | None) -> None:
        """Allow the process this much for this job, in addition to what others have."""
        self.session.run(lambda: self.device_limit.grant(self.order, limit, self.base_cache.size))

    def lower_to(self, limit: int | None) -> None:
        """Leave the rest of the allowance to other jobs."""
        self.session.run(lambda: self.device_limit.lower(self.order, limit, self.base_cache.size))
