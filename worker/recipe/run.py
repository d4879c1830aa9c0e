"""One run of the recipe: its order, its messages to the supervisor, its stop, and how much of its device it may
take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loractl.common.job.adjustment import Adjustment, adjusted, in_words
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Stage
from loractl.worker.base.gauge import Gauge
from loractl.worker.protocol.log_lines import log_line
from loractl.worker.protocol.messages import Adjusted, Again, GoingOn, Note, StageChanged, Start, Told

from .kinds import TrainedKind, trained_kind
from .orders import StopOrder

SIGN_S = 10.0
"""Seconds between two signs of life."""


class Stopped(Exception):
    """The supervisor asked to stop."""


@dataclass(kw_only=True)
class Run:
    """What a step of the recipe may use: the order, where to report, and whether to stop."""

    order: Start
    tell: Callable[[Told], None]
    stop: StopOrder = field(default_factory=StopOrder)
    again: Again | None = None  # memory ran out in mid-training: how another process of the attempt goes on
    stages: list[Stage] = field(default_factory=list)  # stages begun so far
    adjustment: Adjustment = field(init=False)  # what out-of-memory has changed so far
    changes: list[str] = field(init=False)  # the same in words, one for each reduction
    gauge: Gauge = field(init=False)
    _signed: float = field(default_factory=time.monotonic)  # when it last reported to be at work

    def __post_init__(self) -> None:
        self.adjustment = self.order.adjustment
        self.changes = list(self.order.changes)
        self.gauge = Gauge(self.order.device, self.order.gpu)

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
        sys.stderr.write(log_line(self.stages[-1].value if self.stages else "starting", text))
        sys.stderr.flush()

    def adjust(self, adjustment: Adjustment) -> None:
        """Continue with less memory."""
        self.changes.append(in_words(self.order.spec, self.adjustment, adjustment, cards=self.cards))
        self.note("memory", self.changes[-1])
        self.adjustment = adjustment
        self.tell(Adjusted(job_id=self.order.job_id, adjustment=adjustment))

    def check_stop(self) -> None:
        """Call it repeatedly in long work. Raises Stopped."""
        if self.stop.came.is_set():
            raise Stopped
        self.go_on()

    def go_on(self) -> None:
        """Report from time to time that the job is at work: a job that is silent for long is taken to hang."""
        if (now := time.monotonic()) >= self._signed + SIGN_S:
            self._signed = now
            self.tell(GoingOn(job_id=self.order.job_id))
