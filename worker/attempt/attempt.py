"""An attempt as its supervisor has it: what it is, what its trainer reported, what others ask, what its row lacks."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Need, Roomy
from loractl.common.job.status import Reason, Stage
from loractl.common.placement.duration import seconds_left
from loractl.common.store.records import Beat, Claim, Progress, rung_points
from loractl.worker.clock import SYSTEM, NodeClock
from loractl.worker.protocol.log_lines import log_line
from loractl.worker.protocol.messages import (
    Adjusted,
    Again,
    Ended,
    FileKept,
    Note,
    Peaks,
    Planned,
    Saved,
    StageChanged,
    Stepped,
    Told,
)  # fmt: skip

from .log import LOG_FILE, LogBook, append_line
from .trainer_process import TrainerProcess

log = logging.getLogger("loractl.worker")

SAY_EVERY_S = 10.0
"""Seconds between two lines about a job's steps on a worker's terminal; its history has all steps."""


@dataclass(kw_only=True)
class Paced:
    """Where an attempt's time went, by the messages of its trainers. The next attempts' times are predicted by it."""

    began: float  # by the clock
    predicted_s: float | None  # of the attempt, as it began; None: nothing was known
    others: Callable[[], int] = lambda: 0  # jobs on its card at this moment besides it
    prepared_s: float | None = None  # until the first step
    trained_s: float = 0.0
    steps: int = 0
    shared_steps: int = 0  # each counts once for every other job that was on the card as it ended
    _trains: bool = False
    _told: tuple[float, float] | None = None  # the seconds that the trainer expected to need, and when
    _last: tuple[float, int] | None = None  # when this trainer last reported a further step, and which

    def take(self, message: Told, now: float) -> None:
        if isinstance(message, StageChanged):
            self._trains, self._last = message.stage is Stage.TRAINING, None
        elif isinstance(message, Stepped):
            if message.eta_seconds is not None:
                self._told = message.eta_seconds, now
            if not self._trains:
                return
            step, last = message.step, self._last
            if self.prepared_s is None:
                self.prepared_s = now - self.began
            if last is not None and step > last[1]:
                self.trained_s += now - last[0]
                self.steps += step - last[1]
                self.shared_steps += (step - last[1]) * self.others()
            if last is None or step > last[1]:
                self._last = now, step

    def left_s(self, now: float) -> float | None:
        """Until the attempt's end: by what its trainer measures, before that as it was predicted."""
        predicted = (self.predicted_s, self.began) if self._told is None else self._told
        return None if predicted[0] is None else seconds_left(predicted[0], now - predicted[1])

    def added(self, progress: Progress, now: float) -> Progress:
        """What a beat reports, with these times."""
        return replace(
            progress,
            eta_seconds=self.left_s(now),
            prepared_s=self.prepared_s,
            trained_s=self.trained_s or None,
            trained_steps=self.steps or None,
            neighbours=self.shared_steps / self.steps if self.steps else None,
        )


@dataclass(kw_only=True)
class Heard:
    """What an attempt's trainers have reported, folded message by message."""

    at: float  # when one last sent something
    adjustment: Adjustment  # what out-of-memory has changed in the job so far
    changes: list[str] = field(default_factory=list)  # what this trainer said about its adjustments
    step: int = 0
    peaks: Peaks = field(default_factory=Peaks)
    loaded: bool = False  # its base is: what comes next are the longest batches
    ended: Ended | None = None
    wordless: bool = False  # it has ended without a message: `ended` is what its exit status says
    again: Again | None = None  # the trainer ends, and another one continues with less
    saved: list[Saved] = field(default_factory=list)  # checkpoints not passed on yet
    withdrawn: set[str] = field(default_factory=set)  # folders of checkpoints that it found broken

    @property
    def end(self) -> Ended | Again | None:
        """What the trainer says last."""
        return self.ended or self.again

    def take(self, message: Told) -> None:
        if isinstance(message, (Stepped, Ended)) and message.peaks is not None:
            self.peaks = self.peaks.above(message.peaks)
        if isinstance(message, Ended):
            self.ended = message
        elif isinstance(message, Again):
            self.again = message
        elif isinstance(message, Stepped):
            self.step = message.step
        elif isinstance(message, Adjusted):
            self.adjustment = message.adjustment
        elif isinstance(message, Planned) and message.base is not None:
            self.loaded = True
        elif isinstance(message, Note) and message.kind == "memory":
            self.changes.append(message.text)
        elif isinstance(message, Saved):
            self.saved.append(message)


@dataclass(kw_only=True)
class Wishes:
    """What others ask of an attempt: people and the rule by its beats, an order to drain by the node's monitor."""

    cancel_requested: bool = False
    preempted_by: int | None = None
    pruned: str | None = None  # why its sweep stops the job
    card_drained: str | None = None  # whose order keeps one of its cards empty
    time_limit: float | None = None  # seconds, from the last beat: an edit reaches a running job

    def take(self, beat: Beat) -> None:
        self.cancel_requested, self.preempted_by = beat.cancel_requested, beat.preempted_by
        if beat.recorded:
            self.pruned = beat.pruned or self.pruned
            self.time_limit = beat.time_limit if beat.accepted else self.time_limit


@dataclass(kw_only=True)
class Unwritten:
    """What the attempt's row does not have yet."""

    log: LogBook
    pending: Progress = field(default_factory=Progress)
    refused: str | None = None  # why the database last refused a write, already in the history
    _noted: queue.SimpleQueue[tuple[str, str]] = field(default_factory=queue.SimpleQueue)  # from any thread

    def note(self, kind: str, text: str) -> None:
        """Add a line to the job's history with the next beat; any thread may."""
        self._noted.put((kind, text))

    def take(self, message: Told) -> None:
        if isinstance(message, (StageChanged, Note, Adjusted, Planned, Stepped, FileKept)):
            self.pending = _fold(self.pending, message)

    def progress(self, peaks: Peaks, *, last: bool = False) -> Progress:
        """What is new since the last successful write."""
        while not self._noted.empty():
            self.pending = replace(self.pending, events=(*self.pending.events, self._noted.get()))
        return replace(
            self.pending,
            vram_peak=peaks.reserved,
            vram_allocated=peaks.allocated,
            vram_process=peaks.process,
            log=self.log.take(last=last),
        )

    def bare_progress(self, step: int, why: str) -> Progress:
        """Only the stage and the result's box, instead of what the database refused; one line for each cause."""
        new, self.refused = why != self.refused, why
        text = f"the database refused what was told at step {step}, which is left out: {why}"
        events = (("database", text),) if new else ()
        return Progress(stage=self.pending.stage, result_host=self.pending.result_host, events=events)

    def written(self) -> None:
        """Note that the row has it."""
        self.pending = Progress(stage=self.pending.stage)
        self.log.written()


@dataclass(kw_only=True)
class Supervision:
    """What the supervisor has done, and its state."""

    turned_at: float  # when it last passed through its loop
    began: float | None = None  # when the attempt began to train, by the clock
    trainer: TrainerProcess | None = None  # that runs
    pids: frozenset[int] = frozenset()  # of all trainers that ran for it
    said_at: float = -math.inf  # when a step was last named on the terminal
    store_away: bool = False  # fetching or storing waits for the artifact store
    forced: tuple[Reason, str] | None = None  # why it stopped the trainer
    kill_at: float | None = None
    lease_lost: bool = False
    closed: bool = False  # its row is closed; what follows is housekeeping
    result_refused: bool = False  # the row does not name the result: its files are kept


@dataclass(frozen=True, kw_only=True)
class SupervisedAttempt:
    """One attempt from its claim on. Its supervisor's thread writes the parts; the node's monitor writes a drain into
    `wishes`, and into `own` why it ended the trainer of a hanging supervisor."""

    claim: Claim
    folder: Path  # only for this attempt
    clock: NodeClock
    heard: Heard
    paced: Paced
    wishes: Wishes
    unwritten: Unwritten
    own: Supervision

    def turn(self) -> None:
        """Say that the supervisor is alive."""
        self.own.turned_at = self.clock.now()

    def progress(self, *, last: bool = False) -> Progress:
        """What a beat reports: what is new since the last successful write."""
        return self.paced.added(self.unwritten.progress(self.heard.peaks, last=last), self.clock.now())

    def phase(self, stage: Stage, text: str) -> None:
        """Record in history and log something that begins and may take long; any thread may."""
        self.unwritten.note("phase", text)
        self.say(stage, text)

    def say(self, stage: Stage, text: str) -> None:
        """Add a line to the log, and to its file while no trainer writes there and the disk has space."""
        line = log_line(stage.value, text)
        self.unwritten.log.put(line)
        with contextlib.suppress(OSError):  # like a trainer's lines: the database has it anyway
            append_line(self.folder / LOG_FILE, line)

    def hear(self, message: Told) -> None:
        """Take a message from the trainer."""
        self.heard.at = self.clock.now()
        self.heard.take(message)
        self.paced.take(message, self.heard.at)
        self.unwritten.take(message)
        if isinstance(message, Stepped):
            now, last = self.clock.now(), message.step >= message.total_steps
            loss = message.metrics.get("loss")
            if loss is not None and (last or now - self.own.said_at >= SAY_EVERY_S):
                self.own.said_at = now
                log.info("job %s: step %s of %s, loss %.3f", message.job_id, message.step, message.total_steps, loss)
        elif isinstance(message, Note) and message.kind != "saved":  # as often as the job file says
            log.info("job %s: %s", message.job_id, message.text)

    def beaten(self, beat: Beat) -> None:
        """Take a beat's answer: what was pending is written, if it was recorded."""
        self.wishes.take(beat)
        if beat.recorded:
            self.unwritten.written()
            self.own.lease_lost |= not beat.accepted  # once lost it stays lost

    def rung_reached(self) -> int:
        """The step of a rung that the next beat reports, 0 without one. A loser trains for nothing until that beat."""
        return max((point.step for point in rung_points(self.claim, self.unwritten.pending)), default=0)

    def lays_aside(self) -> bool:
        """Whether its trainer ended because its checkpoint is broken: then the attempt goes on, with an older one or
        from the start, and the checkpoint is never tried again."""
        ended = self.heard.ended
        if ended is None or ended.withdrawn is None or ended.withdrawn in self.heard.withdrawn:
            return False
        if self.own.forced is not None or self.own.lease_lost:
            return False
        self.heard.withdrawn.add(ended.withdrawn)
        here = not Path(ended.withdrawn).is_relative_to(self.stored)
        where = "on this box" if here else "from the artifact store"
        self.unwritten.note("withdrawn", f"{ended.message}; it is withdrawn {where}")
        if not here and self.claim.checkpoint is not None:
            self.unwritten.pending = replace(self.unwritten.pending, withdrawn=self.claim.checkpoint.prefix)
        self.heard.ended = None
        return True

    @property
    def stored(self) -> Path:
        """The folder for a checkpoint from the artifact store."""
        return self.folder.parent / "stored"

    def verdict(self) -> tuple[Reason, str]:
        """The attempt's reason: what the trainer said, unless we stopped it before it was done."""
        ended, forced = self.heard.ended, self.own.forced
        if ended is not None and (forced is None or ended.reason is Reason.OK):
            return ended.reason, ended.message
        return forced or (Reason.TRAINER_ERROR, "the trainer was silent")

    @property
    def failed_card(self) -> str | None:
        """Of several cards, the one that the verdict blames; None: the first, or none. A trainer may run a stranger's
        code: it can blame no card that the attempt does not have."""
        card = None if self.heard.ended is None or self.own.forced is not None else self.heard.ended.card
        return card if any(share.node == card for share in self.claim.shares) else None


def begin(
    claim: Claim, work_dir: Path, clock: NodeClock = SYSTEM, others: Callable[[], int] = lambda: 0
) -> SupervisedAttempt:
    """An attempt that was just claimed. `others`: jobs on its card at the moment besides it."""
    return SupervisedAttempt(
        claim=claim,
        folder=work_dir / str(claim.job_id) / f"attempt-{claim.attempt}",
        clock=clock,
        heard=Heard(at=clock.now(), adjustment=claim.adjustment),
        paced=Paced(began=clock.now(), predicted_s=claim.seconds_predicted, others=others),
        wishes=Wishes(time_limit=claim.spec.resources.time_limit),
        unwritten=Unwritten(log=LogBook(clock=clock)),
        own=Supervision(turned_at=clock.now()),
    )


def _fold(progress: Progress, message: Told) -> Progress:
    if isinstance(message, StageChanged):
        return replace(progress, stage=message.stage)
    if isinstance(message, Note):
        events = (*progress.events, (message.kind, message.text))
        resumed = message.resumed_from_step or progress.resumed_from_step
        return replace(progress, events=events, resumed_from_step=resumed)
    if isinstance(message, Adjusted):
        return replace(progress, adjustment=message.adjustment)
    if isinstance(message, FileKept):
        return replace(progress, kept=(*progress.kept, (message.key, message.sha256)))
    if isinstance(message, Planned):
        progress = replace(progress, base_bytes=message.base or progress.base_bytes)
        if message.lora is message.qlora is None:  # it reports the base alone
            return progress
        need, roomy = Need(lora=message.lora, qlora=message.qlora), message.roomy
        roomy_too = None if roomy is None else Roomy.read(roomy)
        return replace(progress, need=need, roomy=roomy_too, running=message.running)
    assert isinstance(message, Stepped)
    metrics = tuple((message.step, name, value) for name, value in message.metrics.items())
    return replace(
        progress,
        step=message.step,
        total_steps=message.total_steps,
        metrics=progress.metrics + metrics,
        loss=message.metrics.get("loss", progress.loss),
        eta_spread_seconds=message.eta_spread_seconds,
        evaluated=message.evaluated,
        to_evaluate=message.to_evaluate,
        tokens_per_second=message.tokens_per_second or progress.tokens_per_second,
    )
