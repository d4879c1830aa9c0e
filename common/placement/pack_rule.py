"""The pack rule: whether a waiting job should train alongside others on their base, or wait for a card of its own.

A pass over the base takes a fixed time (weights are read and dequantised once, kernels are started once), and a time
for each token and for each member. Members share only the fixed part, so a pack pays where that is large compared to
the tokens: for short rows, and longer on a base in NF4. The law is fitted to measured passes and starts from figures of
SmolLM2-135M on a processor; a card that computes faster shows larger fixed parts, and its own passes soon say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

START = {False: (30.0, 2.0), True: (50.0, 2.0)}
"""What a pass costs besides its tokens before any was measured, in tokens: the fixed part, and each member's. By
whether the base is in NF4. They give 1.3 for four jobs of 64 tokens in 16 bit, and 1.5 for four and 1.6 for eight in
NF4, where 1.3, 1.5 to 1.7, and 1.5 to 1.9 were measured (benchmarks/packs.py, on two processors)."""

LEAST_GAIN = 1.05
"""A sweep's jobs join from this speed-up on. No law of this form predicts less than 1, but four jobs of 512 tokens, for
which it predicts 1.04, took 0 to 2 % longer than one by one: below this a gain is not certain."""

TRUST = (0.03 / 1.0) ** 2
"""Weight of the law's starting figures against one measured pass: a pass is off by 3 %, they may be off by their own
size."""

FORGOTTEN = 0.98
"""What a measured pass counts for after each further one: a card's speed changes with its clock and its other users."""

FOLLOWED = 0.3
"""Share of what the law can't explain of a pass, with the members of the pass before, that counts as a change of the
machine's load: all earlier passes then count as that much slower or faster. What new members bring is the law's."""

REWEIGHTED = 4
"""Rounds in which the weights of the starting figures are found."""

DELAY = 0.5
"""Share of its remaining time by which joins may push a member past its promised end. Two equal jobs of different
people that gain what their mean completion asks for end at most this much later."""

CONTENTION = 0.5
"""What a process costs another on its card if that was not measured: half of its pace alone, the middle between nothing
and turns. With it K processes are 2K/(K+1) times as fast as one by one, exactly what members have to gain."""

Numbers = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredPass:
    """A forward and backward pass over the base."""

    tokens: int
    members: int
    seconds: float  # on a processor its own computing: others' load is no cost of the pass
    wall_seconds: float | None = None  # None: the same


@dataclass(frozen=True, kw_only=True)
class PassLaw:
    """How long a pass takes: fixed + token x tokens + member x members, in seconds. Before the first measured pass
    they are in tokens, which is enough for speed-ups."""

    fixed: float
    token: float
    member: float
    load: float = 1.0  # seconds of the clock for one of these, by the last passes: a time limit is about the clock
    _products: tuple[Numbers, ...] = field(default=((0.0,) * 3,) * 3, repr=False)  # of measured passes' numbers
    _sums: Numbers = field(default=(0.0,) * 3, repr=False)
    _start: tuple[float, float] = field(default=START[False], repr=False)
    _company: int = field(default=0, repr=False)  # members of the last measured pass

    @classmethod
    def start(cls, *, quantised: bool) -> PassLaw:
        fixed, member = START[quantised]
        return cls(fixed=fixed, token=1.0, member=member, _start=(fixed, member))

    @classmethod
    def from_json(cls, kept: dict[str, Any] | None, *, quantised: bool) -> PassLaw:
        """The law as a host's row keeps it; the first one where the row has none."""
        if not kept:
            return cls.start(quantised=quantised)
        products, sums = tuple(tuple(row) for row in kept["products"]), tuple(kept["sums"])
        return replace(_fitted(products, sums, START[quantised], kept.get("company", 0)), load=kept.get("load", 1.0))

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads: the sums over measured passes."""
        products = [list(row) for row in self._products]
        return {"products": products, "sums": list(self._sums), "company": self._company, "load": self.load}

    @property
    def is_measured(self) -> bool:
        """Whether `seconds` are seconds."""
        return self._sums[0] > 0

    @property
    def micro_batch(self) -> int | None:
        """Mean tokens of a member in the last measured passes; None: none was measured."""
        return round(self._products[1][2] / self._products[2][2]) if self.is_measured else None

    def seconds(self, tokens: int, members: int) -> float:
        return self.fixed + self.token * tokens + self.member * members

    def speed_up(self, tokens: Sequence[int]) -> float:
        """How much faster one pass of micro-batches of these sizes is than a pass for each."""
        return sum(self.seconds(count, 1) for count in tokens) / self.seconds(sum(tokens), len(tokens))

    def most_added(self, tokens: Sequence[int]) -> float:
        """The most by which one of several micro-batches lengthens the pass of another, as a share of that alone."""
        ordered = sorted(tokens)
        pairs = [(one, ordered[-1]) for one in ordered[:-1]] + [(ordered[-1], ordered[-2])]
        return max((self.token * other + self.member) / self.seconds(one, 1) for one, other in pairs)

    def learn(self, measured: MeasuredPass) -> PassLaw:
        """The law with one more pass. Each counts by its relative error, so that long passes weigh no more."""
        if measured.seconds <= 0:
            return self
        law = self._with(measured, slower=1.0)
        if measured.members == self._company:
            left = measured.seconds / law.seconds(measured.tokens, measured.members)
            law = self._with(measured, slower=left**FOLLOWED)
        load = max(1.0, (measured.wall_seconds or measured.seconds) / measured.seconds)
        return replace(law, load=load if not self.is_measured else self.load + FOLLOWED * (load - self.load))

    def _with(self, measured: MeasuredPass, slower: float) -> PassLaw:
        """The law with one more pass, where all earlier ones would now take `slower` times as long."""
        numbers = tuple(n / measured.seconds for n in (1.0, measured.tokens, measured.members))
        products = tuple(
            tuple(FORGOTTEN * old / slower**2 + a * b for old, b in zip(row, numbers, strict=True))
            for row, a in zip(self._products, numbers, strict=True)
        )
        sums = tuple(FORGOTTEN * old / slower + a for old, a in zip(self._sums, numbers, strict=True))
        return _fitted(products, sums, self._start, measured.members)


def _fitted(products: tuple[Numbers, ...], sums: Numbers, start: tuple[float, float], company: int) -> PassLaw:
    """The least squares, drawn to the starting ratios a little; no part is negative.

    A part is drawn by its deviation as a share of the larger of both, so that a part many times its starting figure is
    held back no more than a part of zero.
    """
    first = (start[0], 1.0, start[1])
    # the scale of the starting figures that the measured passes themselves suggest
    inner = sum(a * b for a, b in zip(sums, first, strict=True))
    whole = sum(a * products[i][j] * b for i, a in enumerate(first) for j, b in enumerate(first))
    scale = inner / whole
    prior = [scale * part for part in first]
    parts, widths = prior, prior
    for _ in range(REWEIGHTED):
        parts = _drawn(products, sums, prior, widths)
        widths = [max(pair) for pair in zip(prior, parts, strict=True)]
    fixed, token, member = parts
    return PassLaw(
        fixed=fixed, token=token, member=member, _products=products, _sums=sums, _start=start, _company=company
    )


def _drawn(
    products: tuple[Numbers, ...], sums: Numbers, prior: Sequence[float], widths: Sequence[float]
) -> list[float]:
    """The parts by least squares, where each is drawn to its prior as if that were known to within a width."""
    left = [list(row) for row in products]
    right = list(sums)
    for n, (part, width) in enumerate(zip(prior, widths, strict=True)):
        left[n][n] += TRUST / width**2
        right[n] += TRUST * part / width**2
    kept = [0, 1, 2]
    while True:
        found = _solved([[left[i][j] for j in kept] for i in kept], [right[i] for i in kept])
        if all(value >= 0 for value in found):
            break
        kept = [n for n, value in zip(kept, found, strict=True) if value >= 0]
    parts = dict(zip(kept, found, strict=True))
    return [parts.get(n, 0.0) for n in range(3)]


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
    job_id: int | None = None  # None: not given
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
    seconds: float | None = None  # of a pass with it, by the clock; None: no pass was measured
    ends: float | None = None  # seconds of the clock to its last pass in the pack; None: not known
    alone: float | None = None  # the same on a card of its own of that kind


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What awaits a job that does not join: a process of its own on the same card, next to the pack and others.

    Each of k processes runs at 1 / (1 + contention (k - 1)) of its pace alone.
    """

    contention: float
    others: int = 0  # trainers there besides the pack

    @property
    def most(self) -> float:
        """What a member may add to another's pass, as a share of that pass alone, so that it costs no more than a
        process would."""
        contention = min(1.0, self.contention)
        return contention / (1 + contention * self.others)


def join_verdict(
    law: PassLaw, running: Sequence[PackedJob], joining: PackedJob, *, apart: Sharing | None = None
) -> JoinVerdict:
    """Whether `joining` should train alongside `running`.

    The jobs of one sweep must gain throughput, as far as the law can tell: one person waits for all of them, so no
    single job has a promised end. Others must gain as much as their mean completion does: K equal jobs one by one end
    after (K + 1) / 2 of their times in the mean, in a pack all at the end. `apart`: the job would not wait but share
    the card in a process of its own. Then the pack must match that for each member, and no end is promised there
    either: none may cost another more than its process would. A pass is a sum, so this also holds for members that
    stay when others leave. A sweep is exempt: its gain is the law's, and what a process costs is assumed. No join
    breaks a time limit.
    """
    every = [*running, joining]
    tokens = [job.tokens for job in every]
    count, speed_up = len(every), law.speed_up(tokens)
    sweep = joining.sweep is not None and {job.sweep for job in every} == {joining.sweep}
    together = sweep or apart is not None
    needed = LEAST_GAIN if sweep else 2 * count / (count + 1)
    if apart is not None and not sweep:
        needed = count / (1 + apart.most * (count - 1))
        if (added := law.most_added(tokens)) > apart.most:
            slower = f"a member of one pass would slow another by {100 * added:.0f} %"
            why = f"{slower}, a separate process on the card by {100 * apart.most:.0f} %"
            return JoinVerdict(pays=False, speed_up=speed_up, needed=needed, why=why)
    elif speed_up < needed:
        why = f"{count} jobs in one pass are {speed_up:.2f} times as fast as one by one, less than {needed:.2f}"
        return JoinVerdict(pays=False, speed_up=speed_up, needed=needed, why=why)
    if any(job.limit_seconds is not None and job.passes is None and job.left_seconds is None for job in running):
        why = "a member has a time limit, and how long it takes is not known yet"
        return JoinVerdict(pays=False, speed_up=speed_up, needed=needed, why=why)
    before = law.seconds(sum(job.tokens for job in running), len(running))
    after = law.seconds(sum(job.tokens for job in every), count)
    wall = after * law.load
    for job in every:
        if (late := _too_late(job, after / before, wall, promised=not together)) is not None:
            return JoinVerdict(pays=False, speed_up=speed_up, needed=needed, why=late)
    why = f"{count} jobs in one pass are {speed_up:.2f} times as fast as one by one"
    alone = law.seconds(joining.tokens, 1)
    verdict = JoinVerdict(pays=True, speed_up=speed_up, needed=needed, why=why, slowdown=after / alone)
    if not law.is_measured:
        return verdict
    verdict = replace(verdict, seconds=wall)
    if joining.passes is None:
        return verdict
    ends = _last_pass(law, running, joining.tokens, joining.passes)
    return replace(verdict, ends=law.load * ends, alone=law.load * alone * joining.passes)


def _last_pass(law: PassLaw, running: Sequence[PackedJob], tokens: int, passes: int) -> float:
    """Seconds to the end of a newcomer's passes alongside members that leave after theirs; unknown members stay."""
    one = law.seconds(sum(job.tokens for job in running), len(running))

    def left(job: PackedJob) -> float:
        if job.left_seconds is not None:
            return job.left_seconds / one
        return math.inf if job.passes is None else job.passes

    total, taken, staying = 0.0, 0.0, sorted(running, key=left)
    while taken < passes:
        until = min(passes, max(taken, left(staying[0]))) if staying else passes
        size = tokens + sum(job.tokens for job in staying)
        total += (until - taken) * law.seconds(size, 1 + len(staying))
        taken, staying = until, staying[1:]
    return total


def _too_late(job: PackedJob, longer: float, wall: float, *, promised: bool) -> str | None:
    """Why the job would end too late. `longer`: how much the newcomer lengthens a pass; `wall`: seconds of the pass
    then, by the clock."""
    left = job.passes * wall if job.passes is not None else None
    if job.left_seconds is not None:
        left = job.left_seconds * longer
    if left is None:
        return None
    if job.limit_seconds is not None and left > job.limit_seconds:
        return "a member would exceed its time limit"
    if promised and job.promised_seconds is not None and left > job.promised_seconds * (1 + DELAY):
        return "a member would end later than was promised"
    return None
