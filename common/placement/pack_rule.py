"""The pack rule: whether a waiting job should train beside others on their base, or wait for a card of its own.

A pass over the base takes a fixed time (weights are read and dequantised once, kernels are started once), and a time
for each token and for each member. Members share the fixed part alone, so a pack pays where it is large beside the
tokens: for short rows, and longer on a base in NF4. The law is fitted to measured passes and starts from figures of
SmolLM2-135M on a processor; a card that computes faster shows larger fixed parts, and its own passes soon say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

START = {False: (30.0, 2.0), True: (40.0, 2.0)}
"""What a pass costs beside its tokens before any was measured, in tokens: the fixed part, and each member's. By whether
the base is in NF4. They give 1.3 for four jobs of 64 tokens in 16 bit, 1.0 for four of 512, and 1.5 for eight of 64 in
NF4, as measured (benchmarks/packs.py)."""

TRUST = (0.03 / 1.0) ** 2
"""Weight of the figures that the law starts from beside one measured pass: that is off by 3 %, they by as much as
they are."""

FORGOTTEN = 0.98
"""What a measured pass counts for after each further one: a card's speed changes with its clock and its other users."""

DELAY = 0.5
"""Share of its remaining time by which joins may push a member past the end that was promised to it. Two equal jobs of
different people that gain what their mean completion asks for end at most so much later."""

Numbers = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredPass:
    """A forward and backward pass over the base."""

    tokens: int
    members: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PassLaw:
    """How long a pass takes: fixed + token x tokens + member x members, in seconds. Before a first pass was measured
    they are in tokens, which tells speed-ups all the same."""

    fixed: float
    token: float
    member: float
    _products: tuple[Numbers, ...] = field(default=((0.0,) * 3,) * 3, repr=False)  # of measured passes' numbers
    _sums: Numbers = field(default=(0.0,) * 3, repr=False)
    _start: tuple[float, float] = field(default=START[False], repr=False)

    @classmethod
    def start(cls, *, quantised: bool) -> PassLaw:
        fixed, member = START[quantised]
        return cls(fixed=fixed, token=1.0, member=member, _start=(fixed, member))

    @classmethod
    def from_json(cls, kept: dict[str, Any] | None, *, quantised: bool) -> PassLaw:
        """The law as a host's row keeps it; the first one where the row has none."""
        if kept is None:
            return cls.start(quantised=quantised)
        products, sums = tuple(tuple(row) for row in kept["products"]), tuple(kept["sums"])
        return _fitted(products, sums, START[quantised])

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads: the sums over measured passes."""
        return {"products": [list(row) for row in self._products], "sums": list(self._sums)}

    @property
    def is_measured(self) -> bool:
        """Whether `seconds` are seconds."""
        return self._sums[0] > 0

    @property
    def micro_batch(self) -> int | None:
        """Tokens that a member had in a measured pass, in the mean of the last ones; None: none was measured."""
        return round(self._products[1][2] / self._products[2][2]) if self.is_measured else None

    def seconds(self, tokens: int, members: int) -> float:
        return self.fixed + self.token * tokens + self.member * members

    def speed_up(self, tokens: Sequence[int]) -> float:
        """How much faster one pass of micro-batches of so many tokens is than a pass of each."""
        return sum(self.seconds(count, 1) for count in tokens) / self.seconds(sum(tokens), len(tokens))

    def learn(self, measured: MeasuredPass) -> PassLaw:
        """The law with one more pass. Each counts by its relative error, so that long passes weigh no more."""
        if measured.seconds <= 0:
            return self
        numbers = tuple(n / measured.seconds for n in (1.0, measured.tokens, measured.members))
        products = tuple(
            tuple(FORGOTTEN * old + a * b for old, b in zip(row, numbers, strict=True))
            for row, a in zip(self._products, numbers, strict=True)
        )
        sums = tuple(FORGOTTEN * old + a for old, a in zip(self._sums, numbers, strict=True))
        return _fitted(products, sums, self._start)


def _fitted(products: tuple[Numbers, ...], sums: Numbers, start: tuple[float, float]) -> PassLaw:
    """The least squares, drawn to the starting ratios a little; no part is negative."""
    first = (start[0], 1.0, start[1])
    # the scale of the starting figures that the measured passes themselves suggest
    inner = sum(a * b for a, b in zip(sums, first, strict=True))
    whole = sum(a * products[i][j] * b for i, a in enumerate(first) for j, b in enumerate(first))
    scale = inner / whole
    prior = [scale * part for part in first]
    left = [list(row) for row in products]
    right = list(sums)
    for n, part in enumerate(prior):
        left[n][n] += TRUST / part**2
        right[n] += TRUST / part
    kept = [0, 1, 2]
    while True:
        found = _solved([[left[i][j] for j in kept] for i in kept], [right[i] for i in kept])
        if all(value >= 0 for value in found):
            break
        kept = [n for n, value in zip(kept, found, strict=True) if value >= 0]
    parts = dict(zip(kept, found, strict=True))
    fixed, token, member = (parts.get(n, 0.0) for n in range(3))
    return PassLaw(fixed=fixed, token=token, member=member, _products=products, _sums=sums, _start=start)


def _solved(left: list[list[float]], right: list[float]) -> list[float]:
    """Gauss's elimination with pivots, for the one to three unknowns of the law."""
    rows = [[*row, value] for row, value in zip(left, right, strict=True)]
    for n in range(len(rows)):
        best = max(range(n, len(rows)), key=lambda i: abs(rows[i][n]))
        rows[n], rows[best] = rows[best], rows[n]
        for i in range(len(rows)):
            if i != n:
                share = rows[i][n] / rows[n][n]
                rows[i] = [a - share * b for a, b in zip(rows[i], rows[n], strict=True)]
    return [row[-1] / row[n] for n, row in enumerate(rows)]


@dataclass(frozen=True, kw_only=True)
class PackedJob:
    """What the rule sees of a job that trains on a base, or would."""

    tokens: int  # of a micro-batch
    passes: int | None = None  # that are left; None: not known
    left_seconds: float | None = None  # the same in the pack as it is, measured; it goes before `passes`
    sweep: str | None = None  # whose jobs one person waits for together
    limit_seconds: float | None = None  # left of its own time limit
    promised_seconds: float | None = None  # left to the end that was promised


@dataclass(frozen=True, kw_only=True)
class JoinVerdict:
    """Whether a join pays, and by which numbers."""

    pays: bool
    speed_up: float  # of the pack with the joining job, against its members one by one
    needed: float
    why: str
    slowdown: float = math.inf  # of the joining job in the pack, against itself alone there
    seconds: float | None = None  # of a pass with it; None: no pass was measured


def join_verdict(
    law: PassLaw, running: Sequence[PackedJob], joining: PackedJob, *, shared: bool = False
) -> JoinVerdict:
    """Whether `joining` should train beside `running`.

    The jobs of one sweep must lose no throughput: one person waits for all of them, so no end of one was promised
    apart. Others must gain as much as their mean completion does: K equal jobs one by one end after (K + 1) / 2 of
    their times in the mean, in a pack all at the end. `shared`: the card would be shared by processes anyway, which
    gains nothing and makes all of them later, so the pack need not gain either. No join breaks a time limit.
    """
    every = [*running, joining]
    count, speed_up = len(every), law.speed_up([job.tokens for job in every])
    together = shared or (joining.sweep is not None and {job.sweep for job in every} == {joining.sweep})
    needed = 1.0 if together else 2 * count / (count + 1)
    if speed_up < needed:
        why = f"{count} jobs in one pass are {speed_up:.2f} times as fast as one by one, less than {needed:.2f}"
        return JoinVerdict(pays=False, speed_up=speed_up, needed=needed, why=why)
    if any(job.limit_seconds is not None and job.passes is None and job.left_seconds is None for job in running):
        why = "a member has a time limit, and how long it takes is not known yet"
        return JoinVerdict(pays=False, speed_up=speed_up, needed=needed, why=why)
    before = law.seconds(sum(job.tokens for job in running), len(running))
    after = law.seconds(sum(job.tokens for job in every), count)
    for job in every:
        if (late := _too_late(job, before, after, promised=not together)) is not None:
            return JoinVerdict(pays=False, speed_up=speed_up, needed=needed, why=late)
    why = f"{count} jobs in one pass are {speed_up:.2f} times as fast as one by one"
    slowdown, seconds = after / law.seconds(joining.tokens, 1), after if law.is_measured else None
    return JoinVerdict(pays=True, speed_up=speed_up, needed=needed, why=why, slowdown=slowdown, seconds=seconds)


def _too_late(job: PackedJob, before: float, after: float, *, promised: bool) -> str | None:
    """Why the job would end too late. `before`, `after`: how long a pass takes, without the newcomer and with it."""
    left = job.passes * after if job.passes is not None else None
    if job.left_seconds is not None:
        left = job.left_seconds * after / before
    if left is None:
        return None
    if job.limit_seconds is not None and left > job.limit_seconds:
        return "a member would exceed its time limit"
    if promised and job.promised_seconds is not None and left > job.promised_seconds * (1 + DELAY):
        return "a member would end later than was promised"
    return None
