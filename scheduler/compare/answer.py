"""Finished jobs side by side, row by row if they were measured on the same held-out rows."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loractl.common.errors import UsageError
from loractl.common.verdict import MIN_CASES, noticeable, word
from loractl.scheduler.report.answer import result_of

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore
    from loractl.common.job.kinds import TaskKind
    from loractl.common.store.store import Store

Report = dict[str, Any]

LEVEL = 0.05

OTHER_LOSS = "another loss"
"""The reading of a job whose loss is of another kind than the best job's."""

ACCURACY = "preference_accuracy"
"""The measure by which jobs are ranked whose losses differ in kind."""

NOT_KNOWN = "not known"
"""The reading of a job whose loss is not a number, and so is compared with none."""

_APART = {"name", "labels", "priority"}  # settings that have no effect on the result
_BASE = {"base_model", "revision"}  # settings that name the base


@dataclass(frozen=True, kw_only=True)
class Against:
    """How a job's held-out loss differs from the best job's: nats per token, with its 95% interval."""

    change: float
    low: float
    high: float
    p: float  # two-sided
    rows: int
    reading: str = ""

    def as_json(self) -> dict[str, Any]:
        """`change`, `low`, `high`, `p`, `rows` and `reading`; null if not computed."""
        unknown = {key for key, value in vars(self).items() if isinstance(value, float) and not math.isfinite(value)}
        return {key: None if key in unknown else value for key, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class FinishedJob:
    """A job that has succeeded, with its settings and its report."""

    job_id: int
    spec: dict[str, Any]
    report: Report
    against: Against | None = None  # None for the best job, and if the held-out rows differ

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The report's metrics by name."""
        return {metric["name"]: metric for metric in self.report["evaluation"]["metrics"]}

    @property
    def task(self) -> str:
        """The job's task_type."""
        return str(self.kind.task)

    @property
    def kind(self) -> TaskKind:
        """What the job learned to do."""
        from loractl.common.job.kinds import kind_of

        return kind_of(self.spec.get("task_type"))

    @property
    def verdict(self) -> str:
        """The word of its report's verdict, against its own base."""
        return word(str(self.report["verdict"]["reading"]))

    @property
    def measured_loss(self) -> float | None:
        """Held-out loss of the tuned model; None if it could not be measured."""
        tuned = self.metrics["loss"]["tuned"]
        return float(tuned) if tuned is not None and math.isfinite(tuned) else None

    @property
    def companions(self) -> list[int]:
        """The jobs that trained with it in one process: its peak and its time are not its own."""
        return list(self.report["training"].get("companions") or ())

    @property
    def loss(self) -> float:
        """The measured loss; infinite without one, so that the job comes last."""
        return math.inf if self.measured_loss is None else self.measured_loss

    @property
    def accuracy(self) -> float:
        """Preference accuracy of the tuned model, which preference losses of all kinds share; -1 without a measured
        one, so that the job comes last."""
        tuned = self.metrics.get(ACCURACY, {}).get("tuned")
        return -1.0 if tuned is None or self.measured_loss is None or not math.isfinite(tuned) else float(tuned)

    @property
    def rows(self) -> tuple[Any, ...] | None:
        """Equal for jobs measured on the same tokens, by the same loss. None if the report does not say which."""
        losses = self.report["evaluation"].get("row_losses")
        if not losses:
            return None
        measured = ((row, weight, *tokens) for row, weight, _, _, *tokens in losses)
        return held_out_hash(self.report), self.loss_by, *measured

    @property
    def loss_by(self) -> Any:
        """Equal for jobs with the same kind of loss."""
        begun_from = (self.report.get("adapter") or {}).get("init_from") or {}
        return self.kind.loss_by(self.spec, begun_from.get("sha256"))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Finished jobs, least held-out loss first; where losses differ in kind, the highest preference accuracy."""

    jobs: tuple[FinishedJob, ...]

    @property
    def best(self) -> FinishedJob:
        return self.jobs[0]

    @property
    def by_accuracy(self) -> bool:
        """Whether the jobs are ranked by preference accuracy: their losses differ in kind."""
        return any(job.loss_by != self.best.loss_by for job in self.jobs)

    @property
    def differences(self) -> dict[str, list[Any]]:
        """The settings in which the jobs differ, each with its value by job; and what differed under equal settings."""
        return differences(self.jobs) | self.contents

    @property
    def contents(self) -> dict[str, list[str]]:
        """What had different contents in some jobs under the same settings, like a base edited in place: the start of
        its sha256 by job. A base's tokenizer decides which rows are too long, if those are left out."""
        changed = {key.partition(".")[0] for key in differences(self.jobs)}
        left_out = any(job.report["data"].get("too_long_rows_dropped") for job in self.jobs)
        explained = {
            "base_model's files": (base_hash, _BASE),
            "rows to train on": (train_rows_hash, {"dataset"} | (_BASE if left_out else set())),
        }
        found = {
            what: [(read(job.report) or "")[:12] for job in self.jobs]
            for what, (read, settings) in explained.items()
            if changed.isdisjoint(settings)
        }
        return {what: values for what, values in found.items() if "" not in values and len(set(values)) > 1}

    def reading(self, job: FinishedJob) -> str:
        """How the job's loss compares with the best job's."""
        if job.measured_loss is None:
            return NOT_KNOWN
        if job is self.best:
            return "best" if job.rows else "least loss"
        if job.against:
            return job.against.reading
        return "other held-out rows" if job.loss_by == self.best.loss_by else OTHER_LOSS

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON values.

        `jobs`: the best first, each with `job_id`, `name`, `method`, `reading`, `verdict` (the word of
        its report's, against its base), `against_best` (see Against; null
        without a comparison), the report's `metrics`, `peak_memory_bytes` and `wall_seconds`. `differences`: the
        settings in which they differ, each with its values in the order of `jobs`; "base_model's files" and "rows to
        train on" where those differ under the same settings, as the start of each sha256.
        """
        return {"jobs": [self._job(job) for job in self.jobs], "differences": self.differences}

    def _job(self, job: FinishedJob) -> dict[str, Any]:
        return {
            "job_id": job.job_id,
            "name": job.report["job"]["name"],
            "method": job.report["method"],
            "reading": self.reading(job),
            "verdict": job.verdict,
            "against_best": None if job.against is None else job.against.as_json(),
            "metrics": job.report["evaluation"]["metrics"],
            "peak_memory_bytes": job.report["training"]["peak_memory_bytes"],
            "wall_seconds": job.report["wall_seconds"],
        }


def comparison(store: Store, artifacts: ArtifactStore, job_ids: Iterable[int]) -> Comparison:
    """Compare finished jobs. Raises JobNotFound, WrongState without a result, UsageError for different tasks."""
    return compared([finished_job(store, artifacts, job_id) for job_id in job_ids])


def finished_job(store: Store, artifacts: ArtifactStore, job_id: int) -> FinishedJob:
    """A finished job with its report. Raises JobNotFound; WrongState while it has none."""
    job, stored = result_of(store, job_id)
    return FinishedJob(job_id=job_id, spec=job.spec, report=artifacts.read_report(stored))


def base_hash(report: Report) -> str | None:
    """The sha256 of the base's files. Like those of rows, None if the report does not have it."""
    found: str | None = (report.get("base") or {}).get("sha256")
    return found


def train_rows_hash(report: Report) -> str | None:
    """The sha256 of the rows to train on, in their order."""
    found: str | None = report["data"].get("train_rows_sha256")
    return found


def held_out_hash(report: Report) -> str | None:
    """The sha256 of the held-out rows, in their order."""
    found: str | None = report["data"].get("held_out_sha256")
    return found


def compared(jobs: Sequence[FinishedJob]) -> Comparison:
    """The best first, by held-out loss, or by preference accuracy where losses differ in kind; jobs measured on the
    same rows as the best, by its loss, are compared with it.

    These rows also chose the best, so all pairs count as compared (Holm). Raises UsageError for jobs of different
    tasks.
    """
    check_one_task(jobs)
    alike = all(job.loss_by == jobs[0].loss_by for job in jobs)
    order = sorted(jobs, key=lambda job: (job.loss if alike else -job.accuracy, job.job_id))
    best = order[0]
    same = [job for job in order[1:] if job.measured_loss is not None and job.rows and job.rows == best.rows]
    measured = [replace(job, against=_difference(best, job)) if job in same else job for job in order]
    return Comparison(jobs=tuple(_holm(measured)))


def differences(jobs: Sequence[FinishedJob]) -> dict[str, list[Any]]:
    """The settings in which the jobs differ, each with its value by job.

    A key missing from an earlier version's job has its default: it means what happened before the key existed.
    """
    flat = [dict(flat_settings(job.spec)) for job in jobs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in _APART)
    by_key = {key: [settings.get(key, _defaults().get(key)) for settings in flat] for key in keys}
    return {key: values for key, values in by_key.items() if any(value != values[0] for value in values)}


@functools.cache
def _defaults() -> dict[str, Any]:
    from loractl.common.job.spec import JobSpec

    spec = JobSpec.model_validate({"name": "any", "base_model": "any", "dataset": {"path": "any"}})
    return dict(flat_settings(spec.model_dump(mode="json")))


def check_one_task(jobs: Sequence[FinishedJob]) -> None:
    """Refuse jobs of different tasks: a loss of tokens and one of labels can't be compared. Raises UsageError."""
    tasks = {job.task: job.job_id for job in jobs}
    if len(tasks) > 1:
        first, second = tasks.values()
        raise UsageError(
            f"jobs {first} and {second} learn different tasks, so their losses can't be compared", "see task_type"
        )


def _difference(best: FinishedJob, other: FinishedJob) -> Against:
    """The change of the mean loss of a token, a ratio over rows, with its linearised variance (Cochran 1977, 6.9)."""
    mine, theirs = (job.report["evaluation"]["row_losses"] for job in (best, other))
    pairs = [(a[1], b[3] - a[3]) for a, b in zip(mine, theirs, strict=True) if None not in (a[3], b[3])]
    n, tokens = len(pairs), sum(weight for weight, _ in pairs)
    if not tokens:
        return Against(change=math.nan, low=math.nan, high=math.nan, p=1.0, rows=n)
    change = sum(loss for _, loss in pairs) / tokens
    if n < MIN_CASES:
        return Against(change=change, low=math.nan, high=math.nan, p=1.0, rows=n)
    spread = math.sqrt(n / (n - 1) * math.fsum((loss - change * weight) ** 2 for weight, loss in pairs)) / tokens
    reach = statistics.NormalDist().inv_cdf(1 - LEVEL / 2) * spread
    p = _two_sided(abs(change) / spread, n - 1) if spread > 0 else float(change == 0)
    return Against(change=change, low=change - reach, high=change + reach, p=p, rows=n)


def _two_sided(t: float, free: int) -> float:
    """The chance of a larger |t| by Student's distribution (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(free))
    term = total = math.cos(angle) if free % 2 else 1.0
    for power in range(2 + free % 2, free - 1, 2):
        term *= math.cos(angle) ** 2 * (power - 1) / power
        total += term
    inside = math.sin(angle) * total
    return max(0.0, 1 - (2 / math.pi * (angle + inside * (free > 1)) if free % 2 else inside))


def _holm(jobs: Sequence[FinishedJob]) -> list[FinishedJob]:
    """Each comparison's reading, at 5% for all pairs of jobs together (Holm 1979): any job might have been the best."""
    tested = sorted((job for job in jobs if job.against), key=lambda job: job.against.p if job.against else 0.0)
    readings: dict[int, str] = {}
    pairs, holds = len(tested) * (len(tested) + 1) // 2, True
    for place, job in enumerate(tested):
        assert job.against is not None
        holds = holds and job.against.p <= LEVEL / (pairs - place)
        readings[job.job_id] = _reading(job.against, clear=holds)
    return [
        replace(job, against=replace(job.against, reading=readings[job.job_id])) if job.against else job for job in jobs
    ]


def _reading(against: Against, *, clear: bool) -> str:
    """The reading of a difference, by the rule for a change (common/verdict.py); Holm says what is clear."""
    if against.rows < MIN_CASES:
        return "too few rows"
    if not clear:
        return "no clear difference"
    return "no practical difference" if abs(against.change) < noticeable("nats", math.nan) else "worse"


def flat_settings(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """A spec's settings under dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != "labels":
            yield from flat_settings(value, f"{before}{key}.")
        else:
            yield before + key, value
