"""How long a job takes: predicted from what it is to compute and what the lab has measured, with how far off that was.

    seconds = preparing + tokens left x seconds a token + what follows the last step

A prediction says what it rests on (`Basis`). What rests on nothing measured is an hour, and says so.
"""

from __future__ import annotations

import enum
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loractl.common.job.slices import rows_in

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec

UNKNOWN_S = 3600.0
"""What a job counts as if nothing is known of how long it takes."""

LONGEST_S = 1e9
"""No prediction is longer: thirty years. A row can hold it, whatever a job asks for."""

LATE_SHARE, LATE_S = 0.1, 1.0
"""What has outlived its prediction has this share of its time still to run, and at least this many seconds."""

READ = 0.5
"""A token that is read counts as this much of one that is trained on: a pass forward without a pass back."""

ANSWER_STEP, ANSWER_EACH = 32, 5
"""The cost of generating one token of each answer of a batch, before that is measured: the tokens that could be read in
a pass's fixed time, and in its time for each answer. Measured on a processor with SmolLM2-135M."""

ENDING_S = 2.0
"""Seconds from the last answer to the stored result, before they are measured."""

NEWEST = 25
"""The most attempts that a prediction is the median of."""


CONTENTION = 0.5
"""Each of k jobs on a card is taken to run at 1 / (1 + CONTENTION * (k - 1)) of its speed: 0 if they did not slow each
other, 1 if they took turns. Assumed until it is measured on such a card."""

COMPARED = 3
"""As many jobs that were alone on their card, and as many that shared it, make it measured."""

ALONE, SHARED = 0.1, 0.5
"""Other jobs on its card, on average over its steps: at most, of one that was alone, and at least, of one that shared.
"""

MOST_CONTENTION = 100.0
"""No more is kept: by then no job shares a card."""


class Basis(enum.StrEnum):
    """What a prediction rests on, the best first."""

    LIKE = "like"  # jobs just like it, on such a card
    BASE = "base"  # jobs on its base, by its method, on such a card
    CARDS = "cards"  # jobs on its base on other cards, scaled by the cards' speeds where both are measured
    BASES = "bases"  # jobs on other bases or by another method, scaled by parameters
    PAST = "past"  # how long whole jobs of its user took, whatever they computed
    UNKNOWN = "unknown"  # nothing

    @property
    def in_words(self) -> str:
        return _IN_WORDS[self]


_IN_WORDS = {
    Basis.LIKE: "measured on such a card with jobs just like it",
    Basis.BASE: "measured on such a card with its base",
    Basis.CARDS: "measured with its base on other cards",
    Basis.BASES: "measured with other bases or methods, scaled by parameters",
    Basis.PAST: "the median of whole jobs, whatever they computed",
    Basis.UNKNOWN: "not known: nothing like it was measured",
}


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What a job is to compute, whatever it runs on. Tokens are estimated without a tokenizer, and count as trained."""

    steps: int
    step_tokens: float  # of a step, with what is read of the held-out rows between two steps
    closing_tokens: float  # read and generated after the last step
    parameters: int | None  # that each token passes; None: not known

    @classmethod
    def read(cls, value: Mapping[str, Any] | None) -> Extent | None:
        """From a row."""
        return None if value is None else cls(**{name: value[name] for name in cls.__annotations__})


def extent_of(spec: JobSpec, data: Mapping[str, Any], parameters: int | None) -> Extent | None:
    """What a job is to compute, by the rows and tokens of its stored data sets; None if they were not counted."""
    dataset, training, asked = spec.dataset, spec.training, spec.evaluation
    sources = [(dataset.split, None), *((source.split, source.share) for source in dataset.more)]
    every = [data.get(key) or {} for key in ("path", *(f"more.{n}" for n in range(len(dataset.more))))]
    if any(not one.get("rows") or one.get("tokens") is None for one in every):
        return None
    halves, longest = spec.kind.halves, dataset.max_length
    tokens = sum(one["tokens"] for one in every) / sum(one["rows"] for one in every)
    tokens = halves * min(max(1.0, tokens), longest)  # the estimate is 0 for rows of a few bytes
    shared = sum(share or 0.0 for _, share in sources)
    whole = [rows_in(split, one["rows"]) for one, (split, share) in zip(every, sources, strict=True) if not share]
    rows = sum(whole) / (1.0 - shared)
    apart = dataset.test_size or 0.0 if dataset.eval_path is None else 0.0
    measured = rows_in(dataset.eval_split or "train", (data.get("eval_path") or {}).get("rows") or 0)
    held_out = float(measured or apart * rows)
    trained = rows * (1.0 - apart - (dataset.final_size or 0.0))
    if training.packing:
        trained, tokens = trained * tokens / longest, float(longest)
    steps = training.max_steps
    if steps is None:
        steps = math.ceil(math.ceil(trained / training.effective_batch) * (training.num_train_epochs or 1))
    scored = READ * tokens * min(held_out, asked.max_rows or held_out)
    between = 0.0 if training.eval_steps is None else scored / _steps_between(training.eval_steps, steps)
    samples, at_once = min(asked.samples, held_out), asked.per_device_eval_batch_size
    each = tokens + asked.max_new_tokens * (ANSWER_EACH + ANSWER_STEP / max(1.0, min(samples, at_once)))
    return Extent(
        steps=max(1, steps),
        step_tokens=tokens * training.effective_batch + between,
        closing_tokens=2 * (scored + READ * samples * each),  # base and tuned
        parameters=parameters,
    )


def _steps_between(asked: float, steps: int) -> float:
    """Below 1 it is a share of all steps."""
    return max(1.0, asked * steps if asked < 1 else asked)


@dataclass(frozen=True, kw_only=True)
class Undone:
    """What is left of a job."""

    user: str
    base_model: str
    method: str
    need_key: str | None
    extent: Extent | None
    step: int = 0  # the last one that a stored checkpoint has kept
    steps: int | None = None  # of all, as its trainer has counted them; None: not counted yet

    @property
    def share(self) -> float:
        """Of its steps."""
        steps = self.steps or (self.extent.steps if self.extent else 0)
        return max(0.0, 1.0 - self.step / steps) if steps else 1.0

    @property
    def tokens(self) -> float:
        """Of the steps that are left."""
        assert self.extent is not None
        return self.share * (self.steps or self.extent.steps) * self.extent.step_tokens


def slowed(neighbours: float | None, contention: float | None) -> float:
    """The factor by which other jobs on its card slow a job down. `neighbours`: their mean number; `contention`: what
    was measured on cards of this model, None for CONTENTION."""
    return 1.0 + (CONTENTION if contention is None else contention) * (neighbours or 0.0)


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """An attempt that has ended, as far as its time was measured."""

    user: str
    base_model: str
    method: str
    need_key: str | None
    device: str  # its card's model
    extent: Extent | None
    prepared_s: float | None  # from its start to its first step
    trained_s: float | None  # in its steps, with what was measured between them
    steps: int | None
    seconds: float | None  # from its start to its end; None: it did not come to a good end
    resumed: bool = False
    roomy: bool | None = None  # had the room to do without recomputing
    neighbours: float | None = None  # other jobs on its card in its steps, on average; None: an older worker's
    contention: float | None = None  # measured on its card's model

    @property
    def slowed(self) -> float:
        """How many times as long it took as it would have alone on its card."""
        return slowed(self.neighbours, self.contention)

    @functools.cached_property
    def pace(self) -> float | None:
        """Seconds a token, with a card of its own."""
        if self.extent is None or not self.steps or not self.trained_s:
            return None
        return self.trained_s / (self.steps * self.extent.step_tokens) / self.slowed

    @functools.cached_property
    def slowness(self) -> float | None:
        """Seconds a token and a parameter: what compares cards, and bases."""
        if self.pace is None or self.extent is None or not self.extent.parameters:
            return None
        return self.pace / self.extent.parameters

    @property
    def closing_s(self) -> float | None:
        """After its last step."""
        if self.seconds is None or self.prepared_s is None or self.trained_s is None:
            return None
        return max(0.0, self.seconds - self.prepared_s - self.trained_s)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How long what is left of a job takes on one card that it has alone."""

    seconds: float
    basis: Basis
    count: int = 0  # attempts that it is the median of
    step_s: float | None = None  # seconds a step; None: it rests on whole jobs

    @property
    def is_known(self) -> bool:
        return self.basis is not Basis.UNKNOWN


UNKNOWN = Forecast(seconds=UNKNOWN_S, basis=Basis.UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured of jobs like one, on cards like one."""

    pace: float  # seconds a token
    basis: Basis
    count: int  # attempts that `pace` is the median of
    prepared_s: float  # until the first step
    closing: float  # what follows the last step took this much of what is counted for it


Speeds = dict[tuple[object, ...], Speed | None]
"""Speeds that were found already: jobs that differ by their extent alone share one."""


def forecast(job: Undone, device: str, runs: Sequence[TimedRun], known: Speeds | None = None) -> Forecast:
    """The prediction for a card of this model. `runs`: what was measured, the newest first. `known`: of other calls
    with the same runs."""
    if (speed := _speed(job, device, runs, {} if known is None else known)) is None:
        return _by_the_past(job, runs)
    assert job.extent is not None
    closing_s = speed.closing * (job.extent.closing_tokens * speed.pace + ENDING_S)
    return Forecast(
        seconds=min(speed.prepared_s + job.tokens * speed.pace + closing_s, LONGEST_S),
        basis=speed.basis,
        count=speed.count,
        step_s=job.extent.step_tokens * speed.pace,
    )


def shortest(forecasts: Iterable[Forecast]) -> Forecast:
    """What a job counts as while it waits, by its predictions for the fleet's models of card."""
    return min(forecasts, key=lambda one: (not one.is_known, one.seconds), default=UNKNOWN)


def _speed(job: Undone, device: str, runs: Sequence[TimedRun], known: Speeds) -> Speed | None:
    if job.extent is None:
        return None
    key = (device, job.base_model, job.method, job.need_key, job.extent.parameters)
    if key not in known:
        found = _pace(job, device, runs)
        near = _nearest(job, device, runs)
        closing = _first_median(near, _closing)
        known[key] = (
            None
            if found is None
            else Speed(
                pace=found[0],
                basis=found[1],
                count=found[2],
                prepared_s=_first_median(near, lambda run: run.prepared_s) or 0.0,
                closing=1.0 if closing is None else closing,
            )
        )
    return known[key]


def _pace(job: Undone, device: str, runs: Sequence[TimedRun]) -> tuple[float, Basis, int] | None:
    """Seconds a token, what that rests on, and how many attempts."""
    own = [run for run in runs if run.pace and run.base_model == job.base_model and run.method == job.method]
    here = [run for run in own if run.device == device]
    like = [run for run in here if job.need_key is not None and run.need_key == job.need_key]
    speeds = _slowness(runs)

    def scaled(run: TimedRun) -> float:
        """The run's pace as it would be on this card."""
        assert run.pace is not None
        known = device in speeds and run.device in speeds
        return run.pace * speeds[device] / speeds[run.device] if known else run.pace

    for basis, some in ((Basis.LIKE, like), (Basis.BASE, here), (Basis.CARDS, own)):
        if some:
            newest = some[:NEWEST]
            return statistics.median(map(scaled, newest)), basis, len(newest)
    assert job.extent is not None
    parameters = job.extent.parameters
    others = [run for run in runs if run.slowness]
    others = [run for run in others if run.device == device] or others
    others = [run for run in others if run.method == job.method] or others
    if not others or not parameters:
        return None
    slow = statistics.median(run.slowness or 0.0 for run in others[:NEWEST])
    return slow * parameters, Basis.BASES, len(others[:NEWEST])


def _slowness(runs: Iterable[TimedRun]) -> dict[str, float]:
    """Seconds a token and a parameter, by the card's model."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.slowness:
            found.setdefault(run.device, []).append(run.slowness)
    return {device: statistics.median(some[:NEWEST]) for device, some in found.items()}


def _nearest(job: Undone, device: str, runs: Sequence[TimedRun]) -> list[Sequence[TimedRun]]:
    """The runs by how near they are to the job: its like, its base and method on such a card, its base there, its base,
    such a card, all."""
    base = [run for run in runs if run.base_model == job.base_model]
    here = [run for run in base if run.device == device]
    like = [run for run in here if job.need_key is not None and run.need_key == job.need_key]
    same = [run for run in here if run.method == job.method]
    return [like, same, here, base, [run for run in runs if run.device == device], runs]


def _closing(run: TimedRun) -> float | None:
    """What followed the last step, over what is counted for it at the pace of the training."""
    if run.closing_s is None or run.extent is None or run.pace is None:
        return None
    return run.closing_s / (run.extent.closing_tokens * run.pace * run.slowed + ENDING_S)


def _first_median(pools: Iterable[Sequence[TimedRun]], of: Callable[[TimedRun], float | None]) -> float | None:
    """The median of the first pool in which it was measured."""
    for pool in pools:
        if found := [value for run in pool if (value := of(run)) is not None][:NEWEST]:
            return statistics.median(found)
    return None


def _by_the_past(job: Undone, runs: Sequence[TimedRun]) -> Forecast:
    """By whole jobs, if what the job computes is not known: those just like it, its user's on that base, its user's."""
    whole = [run for run in runs if run.seconds is not None and not run.resumed]
    like = [run for run in whole if job.need_key is not None and run.need_key == job.need_key]
    mine = [run for run in whole if run.user == job.user]
    for some in (like, [run for run in mine if run.base_model == job.base_model], mine):
        if some:
            took = statistics.median((run.seconds or 0.0) / run.slowed for run in some[:NEWEST])
            return Forecast(seconds=took * job.share, basis=Basis.PAST, count=len(some[:NEWEST]))
    return replace(UNKNOWN, seconds=UNKNOWN_S * job.share)


def measured_contention(runs: Iterable[TimedRun], device: str) -> float | None:
    """What CONTENTION is on cards of this model: the median by how much jobs that shared a card were slower than jobs
    just like them that had one alone. None: too few of either were measured."""
    like: dict[object, list[TimedRun]] = {}
    for run in runs:
        if run.device == device and run.pace and run.neighbours is not None and run.need_key is not None:
            like.setdefault((run.base_model, run.method, run.need_key, run.roomy), []).append(run)
    found, compared = list[float](), 0
    for some in like.values():
        alone = [run.pace for run in some if run.pace and (run.neighbours or 0.0) <= ALONE]
        shared = [run for run in some if run.neighbours and run.neighbours >= SHARED]
        if alone and shared:
            own, compared = statistics.median(alone), compared + len(alone)
            found += [((run.pace or 0.0) * run.slowed / own - 1) / (run.neighbours or 1.0) for run in shared]
    if min(compared, len(found)) < COMPARED:
        return None
    return min(max(0.0, statistics.median(found)), MOST_CONTENTION)


def seconds_left(predicted_s: float, ran_s: float) -> float:
    """What is left `ran_s` after it was predicted. An attempt that outlives its prediction counts as longer."""
    return max(predicted_s - ran_s, LATE_SHARE * ran_s, LATE_S)


@dataclass(frozen=True, kw_only=True)
class TimeMeasured:
    """An attempt that came to a good end: what was predicted as it started, and what it took. Predictions are of a card
    that a job has alone, so `took_s` is without what others on its card cost it."""

    device_name: str
    basis: Basis
    predicted_s: float
    took_s: float

    @property
    def factor(self) -> float:
        """How far off: 2 for a half and for a double."""
        return max(self.took_s / self.predicted_s, self.predicted_s / self.took_s)


@dataclass(frozen=True, kw_only=True)
class TimeAccuracy:
    """How accurate predictions were on one model of card, by what they rested on."""

    device_name: str
    basis: Basis
    count: int
    ratio: float  # the median of taken / predicted
    off: float  # the median of the factors by which they were off
    worst: float  # that of nine in ten was smaller


def time_accuracy(attempts: Iterable[TimeMeasured]) -> list[TimeAccuracy]:
    """Predicted against taken, by the card's model and what the prediction rested on."""
    found: dict[tuple[str, Basis], list[TimeMeasured]] = {}
    for one in attempts:
        if one.predicted_s > 0 and one.took_s > 0:
            found.setdefault((one.device_name, one.basis), []).append(one)
    return [
        TimeAccuracy(
            device_name=device,
            basis=basis,
            count=len(some),
            ratio=statistics.median(one.took_s / one.predicted_s for one in some),
            off=statistics.median(one.factor for one in some),
            worst=sorted(one.factor for one in some)[math.ceil(0.9 * len(some)) - 1],
        )
        for (device, basis), some in sorted(found.items(), key=lambda item: (item[0][0], list(Basis).index(item[0][1])))
    ]
