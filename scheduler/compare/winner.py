"""The best of a sweep's finished members: how clearly it is best, and its loss corrected for the choice among them.
It was measured on the very rows that made it the best.

The correction draws rows with replacement, the same ones for every job. The job that is best on the drawn rows is
measured on the others, which had no part in that choice (bootstrap bias correction, Tsamardinos, Greasidou and
Borboudakis 2018, https://doi.org/10.1007/s10994-018-5714-4). The mean over the draws is the corrected change, and the
middle 95 % of the draws are its interval. A draw leaves out about 37 % of the rows, so the interval is rather too wide.
"""

from __future__ import annotations

import functools
import math
import operator
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import WrongState
from loractl.common.job.sweep import Member, SweepView
from loractl.common.store.store import Store
from loractl.common.text import in_words, number
from loractl.common.verdict import MIN_CASES, MeasuredChange, chose_step, written
from loractl.scheduler.report.answer import FinalResult, look, result_of
from loractl.scheduler.status.standing import named_settings

from .answer import NOT_KNOWN, OTHER_LOSS, Comparison, FinishedJob, comparison

DRAWS = 1000
SEED = 7

MOST_GROUPS = 500
"""More rows than this are drawn in this number of groups: that takes less time, and the interval stays the same."""

OUT_OF_REACH = 1e-9
"""A job whose difference from the best is less likely by chance than this wins no draw."""

Column = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class CorrectedChange(MeasuredChange):
    """The best job's held-out loss against its base, as it would be on rows that did not choose it."""

    among: int  # jobs that might be the best; 1: no other comes close, and the choice changes nothing
    results: int  # all that were measured

    @property
    def metric(self) -> dict[str, Any]:
        """As a report holds a metric."""
        return {**vars(self), "name": "loss", "tuned": self.base + self.change, "reading": self.reading}

    def as_json(self) -> dict[str, Any]:
        """`among`, `results`, `rows`, `base`, `tuned`, `change`, `low`, `high` and `reading`."""
        kept = ("base", "tuned", "change", "low", "high", "reading")
        counts = {"among": self.among, "results": self.results, "rows": self.cases}
        return {**counts, **{key: self.metric[key] for key in kept}}


def corrected(comparison: Comparison) -> CorrectedChange | None:
    """None if it can't be computed: too few rows, a report without the losses of its rows, or a report on other
    rows."""
    best, measured = comparison.best, [job for job in comparison.jobs if job.measured_loss is not None]
    if any(job.rows is None or job.rows != best.rows for job in measured):
        return None
    near = [job for job in measured if job is best or (job.against and job.against.p > OUT_OF_REACH)]
    losses = best.report["evaluation"]["row_losses"]
    if len(losses) < MIN_CASES or any(None in row for job in near for row in job.report["evaluation"]["row_losses"]):
        return None
    weights, base = (_column(best, place) for place in (1, 2))
    loss = best.metrics["loss"]
    if not sum(weights) or None in (loss["base"], loss["low"], loss["high"]):
        return None
    if len(near) == 1:
        change, low, high = best.loss - loss["base"], float(loss["low"]), float(loss["high"])
    else:
        change, low, high = _out_of_bag(weights, base, tuple(_column(job, 3) for job in near))
    return CorrectedChange(
        among=len(near),
        results=len(measured),
        cases=len(losses),
        base=float(loss["base"]),
        change=change,
        low=low,
        high=high,
    )


def _column(job: FinishedJob, place: int) -> Column:
    """The values of all rows, or with many rows the sums of groups, the same groups for each job."""
    values = [float(row[place]) for row in job.report["evaluation"]["row_losses"]]
    groups = min(len(values), MOST_GROUPS)
    return tuple(math.fsum(values[first::groups]) for first in range(groups))


@functools.lru_cache(maxsize=32)  # a page asks again and again
def _out_of_bag(weights: Column, base: Column, losses: Sequence[Column]) -> tuple[float, float, float]:
    """(change, low, high) against the base: of the job that wins a draw, on the rows that the draw left out."""
    rng = random.Random(SEED)  # noqa: S311  no secret: the same draws each time
    rows, changes = range(len(weights)), list[float]()
    for _ in range(DRAWS):
        drawn = rng.choices(rows, k=len(weights))
        of_drawn = operator.itemgetter(*drawn)
        wins = losses[min(range(len(losses)), key=[sum(of_drawn(column)) for column in losses].__getitem__)]
        left = sorted(set(rows) - set(drawn))
        if tokens := sum(map(weights.__getitem__, left)):
            changes.append(math.fsum(wins[row] - base[row] for row in left) / tokens)
    ends = statistics.quantiles(changes, n=40)
    return statistics.fmean(changes), ends[0], ends[-1]


@dataclass(frozen=True, kw_only=True)
class SweepComparison:
    """A sweep with its finished members compared."""

    sweep: SweepView
    comparison: Comparison
    final: FinalResult | None = None  # the best member's, once all have ended

    @property
    def runner_up(self) -> FinishedJob | None:
        """The second best; None if only one member has a result."""
        return self.comparison.jobs[1] if len(self.comparison.jobs) > 1 else None

    @property
    def clear(self) -> bool:
        """Whether the best member's loss is clearly less than every other result's."""
        return self.runner_up is not None and not self.alike and not self._measured_otherwise

    @property
    def alike(self) -> list[int]:
        """The members that can't be told apart from the best."""
        return [job.job_id for job in self.comparison.jobs[1:] if job.against and job.against.reading != "worse"]

    @property
    def _measured_otherwise(self) -> dict[str, list[int]]:
        """The members not compared with the best, by reason."""
        found: dict[str, list[int]] = {}
        for job in self.comparison.jobs[1:]:
            if not job.against:
                found.setdefault(self.comparison.reading(job), []).append(job.job_id)
        return found

    @functools.cached_property
    def corrected(self) -> CorrectedChange | None:
        """The best member's change as it would be on rows that did not choose it; None if that is unknown."""
        return corrected(self.comparison) if self.chosen else None

    @property
    def chosen(self) -> bool:
        """Whether the winner is the best of several, and so looks better on these rows than it is."""
        return self.runner_up is not None or any(member.rungs for member in self.stopped)

    def _chosen_beside(self) -> Iterator[str]:
        """What else these rows chose, apart from the best of the results."""
        if stopped := sum(bool(member.rungs) for member in self.stopped):
            yield f"{stopped} more lost on these rows and were stopped"
        best, training = self.comparison.best, self.comparison.best.report["training"]
        if chose_step(
            keeps_best=bool((best.spec.get("training") or {}).get("load_best_model_at_end")),
            evaluations=len(training.get("eval_losses") or ()),
            stopped_early=training.get("stopped_early_at_step") is not None,
        ):
            yield "these rows chose its step, too"

    @property
    def second_look(self) -> str:
        """What is said of the best member beyond its loss: its final rows, or else how the choice biases that loss.
        Empty if there was no choice."""
        if self.final is not None:
            return self.final.sentence
        if not self.comparison.best.report["data"].get("final_rows"):
            return self.caution
        ask = f"loractl compare --sweep {self.sweep.sweep_id}"
        told = f"shown by {ask}, and nobody has looked yet" if self.sweep.ended else "shown once all members have ended"
        return f"{self.caution} What its final rows say is {told}.".lstrip()

    @property
    def caution(self) -> str:
        """How the choice biases the best member's loss; empty if there was no choice."""
        if not self.chosen:
            return ""
        if (change := self.corrected) is None or self.runner_up is None:
            return "Its loss is optimistic, since it was chosen on these rows."
        also = f" It stays optimistic: {'; '.join(more)}." if (more := list(self._chosen_beside())) else ""
        if change.among == 1:
            return f"No other comes near it: the choice changes nothing of its loss.{also}"
        shown = written(change.metric)
        loss = f"loss {shown.base} -> {shown.tuned}, {shown.change} ({shown.interval}), {shown.reading}"
        far = f" of {change.results}, since the others are too far behind to be the best," * (
            change.among < change.results
        )
        how = f"Corrected for the choice among {change.among}{far} on the same {change.cases} rows"
        return f"{how}, against the base: {loss}.{also}"

    @property
    def stopped(self) -> tuple[Member, ...]:
        """The members that were stopped early."""
        return tuple(member for member in self.sweep.members if member.pruned)

    @property
    def stopped_ahead(self) -> Member | None:
        """The stopped member with the least loss, if that is less than the runner-up's or the only result's.

        It lost to members that are not among the results, or to the best one, and where it would have ended is unknown:
        it is no runner-up.
        """
        last = self.runner_up or self.comparison.best
        ahead = [(m.rungs[-1].loss, m.job_id, m) for m in self.stopped if m.rungs and m.rungs[-1].loss < last.loss]
        return min(ahead)[-1] if ahead else None

    @property
    def sentence(self) -> str:
        """The member with the least held-out loss, and whether its difference from the next is clear."""
        if (ahead := self.stopped_ahead) is None:
            return self._verdict
        point = ahead.rungs[-1]
        had = f"{number(point.loss, 3)} when it was stopped at {point.rung * 100:g} %"
        return f"{self._verdict} Job {ahead.job_id} had {had}."

    @property
    def _verdict(self) -> str:
        best = self.comparison.best
        member = next(member for member in self.sweep.members if member.job_id == best.job_id)
        so_far = "" if self.sweep.ended else " so far"
        least = "Least loss" if self.sweep.unlike is not None else "Best"
        rank, reached = f"{least}{so_far}", f"held-out loss {number(best.measured_loss, 3)}"
        if self.comparison.by_accuracy:
            rank, reached = f"Best{so_far} by preference accuracy", f"{number(best.accuracy, 1)} %"
        head = f"{rank}: {best.job_id} ({named_settings(self.sweep, member)}), {reached}"
        if self.runner_up is None:
            return f"{head}, the only member with a result."
        if self.clear:
            return f"{head}, clearly less than every other result."
        told = []
        if self.alike:
            rows = len(best.report["evaluation"]["row_losses"])
            few = f"on {rows} rows " if rows < MIN_CASES else ""
            told.append(f"{few}{_some(self.alike)} can't be told apart from it")
        for why, other in self._measured_otherwise.items():
            be = "was" if len(other) == 1 else "were"
            how = f"{be} measured {'by another loss' if why == OTHER_LOSS else 'on other rows'}"
            told.append(f"{_some(other)} {'could not be measured' if why == NOT_KNOWN else how}")
        return f"{head}; {', and '.join(told)}."

    def as_json(self) -> dict[str, Any]:
        """What a Comparison prints, and:

        `sweep_id`, `ended`; `winner`: the best member's `job_id`, the `runner_up` (null without one), whether its loss
        is `clear`ly less than every other, the members that are `alike`, the `sentence` that says so, its change
        `corrected` for the choice (see CorrectedChange; null if there is none), the `caution`, and `final`, what it
        measured on its final rows (see FinalResult; null if it has none, and before all have ended); `stopped`: each
        member that was stopped early with `job_id`, `settings`, `step`, `total_steps` and `rungs`.
        """
        return {
            **self.comparison.as_json(),
            "sweep_id": self.sweep.sweep_id,
            "ended": self.sweep.ended,
            "winner": {
                "job_id": self.comparison.best.job_id,
                "runner_up": None if self.runner_up is None else self.runner_up.job_id,
                "clear": self.clear,
                "alike": self.alike,
                "sentence": self.sentence,
                "corrected": None if self.corrected is None else self.corrected.as_json(),
                "caution": self.caution,
                "final": None if self.final is None else self.final.as_json(),
            },
            "stopped": [_as_stopped(member) for member in self.stopped],
        }


def sweep_comparison(store: Store, artifacts: ArtifactStore, sweep_id: int, user: str) -> SweepComparison:
    """Compare the finished members of a sweep for `user`; once all have ended, this is a look at the best one's final
    rows. Raises SweepNotFound; WrongState if no member has a result."""
    sweep = store.sweeps.get(sweep_id)
    finished = [member.job_id for member in sweep.members if member.has_result]
    if not finished:
        raise WrongState(
            f"no member of sweep {sweep_id} has a result",
            f"loractl status --sweep {sweep_id} shows their state",
        )
    order = comparison(store, artifacts, finished)
    best = order.best.job_id
    final = look(store, artifacts, best, result_of(store, best)[1], user) if sweep.ended else None
    return SweepComparison(sweep=sweep, comparison=order, final=final)


MOST_NAMED = 6


def _some(job_ids: Sequence[int]) -> str:
    """The numbers of some jobs, and how many more there are."""
    if len(job_ids) <= MOST_NAMED:
        return in_words([str(job_id) for job_id in job_ids])
    return f"{', '.join(map(str, job_ids[:MOST_NAMED]))} and {len(job_ids) - MOST_NAMED} more"


def _as_stopped(member: Member) -> dict[str, Any]:
    return {
        "job_id": member.job_id,
        "settings": dict(member.settings),
        "step": member.step,
        "total_steps": member.total_steps,
        "rungs": [vars(point) for point in member.rungs],
    }
