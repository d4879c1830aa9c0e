"""The measures that a job file defines: which generated answers are right by them, for base and tuned."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loractl.common.data.findings import shares_of
from loractl.common.job.sections import EvaluationSpec, OwnMetric
from loractl.common.verdict import NEW_ROWS

from .answers import Answer
from .comparison import Compared, compare_shares, percent


@dataclass(frozen=True, kw_only=True)
class OwnScores:
    """One measure, answer by answer. None: the expected answer has nothing that it can compare with."""

    name: str
    decides: bool
    base: list[bool | None]
    tuned: list[bool | None]
    seen: list[bool]  # answers to rows that resemble a row to train on
    trouble: str = ""  # why nothing was measured

    @property
    def metrics(self) -> list[Compared]:
        """The share of right answers; where some rows resemble rows to train on, that of the others, too. Answers whose
        expected one can't be compared with are no cases."""
        whole = replace(self._compared(self.name, self.name, self.seen, new=False), own=True, decides=self.decides)
        if not any(self.seen):
            return [whole]
        return [
            whole,
            self._compared(
                f"{NEW_ROWS}{self.name}", f"{self.name}, rows like none that is trained on", self.seen, new=True
            ),
        ]

    def _compared(self, name: str, label: str, seen: Sequence[bool], *, new: bool) -> Compared:
        asked = [(b, t) for b, t, s in zip(self.base, self.tuned, seen, strict=True) if not (new and s)]
        pairs = [(b, t) for b, t in asked if b is not None and t is not None]
        if pairs:
            found = compare_shares(name, label, [b for b, _ in pairs], [t for _, t in pairs])
        else:
            found = percent(name, label).compared(0, *[math.nan] * 4)
        return replace(found, unmeasured=len(asked) - len(pairs))

    @property
    def doubt(self) -> str:
        """A sentence about what it could not measure, or nothing."""
        left, every = self.base.count(None), len(self.base)
        if self.trouble:
            return f"{self.name} was not measured: it {self.trouble}."
        if left == every:
            what = f"any of the {every} expected answers" if every else "answers, which no held-out row asks for"
            return f"{self.name} was not measured: it finds nothing to compare in {what}."
        return f"{self.name} leaves out {left} of {every} answers, with nothing to compare with." if left else ""


def own_scores(
    answers: Sequence[Answer], asked: EvaluationSpec, given_away: Collection[int] = frozenset()
) -> list[OwnScores]:
    """Every measure that the job file defines, on these answers. `given_away`: rows that resemble a row to train on."""
    seen = [answer.row in given_away for answer in answers]
    return [_scores(metric, answers, seen, decides=metric.name == asked.decide_by) for metric in asked.own]


def _scores(metric: OwnMetric, answers: Sequence[Answer], seen: list[bool], *, decides: bool) -> OwnScores:
    expected, trouble = [answer.expected for answer in answers], ""
    base: list[bool | None] = [None] * len(answers)
    tuned = base
    try:
        base = right(metric, [answer.base for answer in answers], expected)
        tuned = right(metric, [answer.tuned for answer in answers], expected)
    except ValueError as error:
        base, tuned, trouble = [None] * len(answers), [None] * len(answers), str(error)
    return OwnScores(name=metric.name, decides=decides, base=base, tuned=tuned, seen=seen, trouble=trouble)


def right(metric: OwnMetric, answers: Sequence[str], expected: Sequence[str]) -> list[bool | None]:
    """Whether each answer is right by the measure; None where the expected one can't be compared with.

    Raises ValueError where its expression takes too long to read them.
    """
    goals = (str(goal) for goal in metric.score.goals(expected, time.thread_time) if goal is not None)
    return metric.score.right(answers, expected, time.thread_time, shares_of(Counter(goals)) or ())


def as_json(scores: Sequence[OwnScores], place: int) -> dict[str, Any]:
    """What one answer of a report has of them: `scores`, and `decided` by the one that decides, base first."""
    found = {one.name: [one.base[place], one.tuned[place]] for one in scores}
    decided = next((found[one.name] for one in scores if one.decides), None)
    return {**({"scores": found} if found else {}), **({"decided": decided} if decided else {})}
