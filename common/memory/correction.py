"""What measured peaks teach the memory plan: a factor per device model, method and family, and jobs seen before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from loractl.common.job.method import Method, Need, Roomy, RoomyForm

LEAN = 2
"""The first version whose steps are lean, unless a job asks for exact steps."""

ENGINE = LEAN
"""The version of the worker's training step, as far as its memory goes. 1 was transformers' Trainer. Raise it when
the memory of steps changes: attempts of an older version teach nothing, and jobs of both are not alike. 0 are attempts
of before revision 0041 that shared a trainer."""


MIN_MEASURED = 3
"""Fewer attempts teach nothing about a family."""

FACTOR_BOUNDS = (0.7, 1.5)
"""A learned factor stays within these; beyond them the plan is wrong, and should be fixed rather than scaled."""

LIKE_IT_SPARE = 1.05
"""Added to the peak of a job just like it: fragmentation differs between runs by this much."""

GROWTH = 1.25
"""A reservation that was too small grows by this: a quarter reaches the next size of card in one or two tries."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One attempt on a GPU that ended well, or ran out of its reservation. Bytes."""

    device_name: str
    method: Method
    family: str | None
    need_key: str | None
    planned: int | None  # with its margin, nothing learned
    reserved: int | None
    peak: int | None  # of the process; None: not measured
    out_of_memory: bool
    roomy: bool = False  # it had the room to do without recomputing


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How accurate the plan is for one device model, method and family."""

    device_name: str
    method: Method
    family: str | None
    roomy: bool = False  # without recomputing
    count: int
    ratio: float  # mean of measured / planned
    spread: float  # its standard deviation
    worst: float  # the largest

    @property
    def factor(self) -> float | None:
        """What a plan is multiplied by; None while too little was measured.

        Two deviations above the mean, and never below what was seen.
        """
        if self.count < MIN_MEASURED:
            return None
        low, high = FACTOR_BOUNDS
        return min(high, max(low, self.worst, self.ratio + 2 * self.spread))


def accuracy(attempts: Iterable[Measured]) -> list[Accuracy]:
    """Predicted against measured, by device model, method, family, and whether it recomputed."""
    import statistics

    ratios: dict[tuple[str, Method, str | None, bool], list[float]] = {}
    for attempt in attempts:
        if attempt.planned and attempt.peak and not attempt.out_of_memory:
            family = attempt.device_name, attempt.method, attempt.family, attempt.roomy
            ratios.setdefault(family, []).append(attempt.peak / attempt.planned)
    return [
        Accuracy(
            device_name=device,
            method=method,
            family=family,
            roomy=roomy,
            count=len(measured),
            ratio=statistics.fmean(measured),
            spread=statistics.stdev(measured) if len(measured) > 1 else 0.0,
            worst=max(measured),
        )
        for (device, method, family, roomy), measured in sorted(
            ratios.items(), key=lambda item: tuple(map(str, item[0]))
        )
    ]


def learned(planned: Need, need_key: str, attempts: Sequence[Measured]) -> Need:
    """The plan corrected by measurements. `attempts`: those of the same key or the same family."""
    attempts = [attempt for attempt in attempts if not attempt.roomy]
    return Need(
        lora=_learned(planned.lora, Method.LORA, need_key, attempts),
        qlora=_learned(planned.qlora, Method.QLORA, need_key, attempts),
    )


def learned_roomy(planned: Roomy, need_key: str, attempts: Sequence[Measured]) -> Roomy:
    """The plan of what the job takes without recomputing, corrected by attempts that had the room. A micro-batch of one
    size teaches other sizes in proportion to their plans."""

    def corrected(method: Method) -> tuple[RoomyForm, ...]:
        factor = _factor(need_key, [a for a in attempts if a.roomy and a.method is method])
        return tuple(replace(form, bytes=int(form.planned * factor)) for form in planned.of(method))

    return Roomy(lora=corrected(Method.LORA), qlora=corrected(Method.QLORA))


def _factor(need_key: str, attempts: Sequence[Measured]) -> float:
    same = [(a, a.planned) for a in attempts if a.need_key == need_key and a.planned]
    too_little = [a.reserved * GROWTH / planned for a, planned in same if a.out_of_memory and a.reserved]
    like_it = [a.peak * LIKE_IT_SPARE / planned for a, planned in same if a.peak and not a.out_of_memory]
    factors = [entry.factor for entry in accuracy(attempts) if entry.factor is not None]
    return max(*(like_it or factors or [1.0]), *too_little, 0.0)


def peaks_like(need_key: str, method: Method, attempts: Iterable[Measured]) -> list[int]:
    """Measured peaks of jobs just like it, in bytes."""
    same = [a for a in attempts if a.need_key == need_key and a.method is method and not a.roomy]
    return [a.peak for a in same if a.peak and not a.out_of_memory]


def _learned(planned: int | None, method: Method, need_key: str, attempts: Sequence[Measured]) -> int | None:
    same = [a for a in attempts if a.method is method]
    like_it = peaks_like(need_key, method, same)
    # what was too little once is too little again, even if the plan says less
    too_little = [int(a.reserved * GROWTH) for a in same if a.need_key == need_key and a.out_of_memory and a.reserved]
    if like_it:
        return max(int(max(like_it) * LIKE_IT_SPARE), *too_little, 0)
    if planned is None:
        return max(too_little, default=None)
    factors = [entry.factor for entry in accuracy(same) if entry.factor is not None]
    return max(int(planned * max(factors, default=1.0)), *too_little, 0)
