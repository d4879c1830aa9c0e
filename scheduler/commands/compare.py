"""loractl compare: finished jobs side by side, row by row where they were measured on the same held-out rows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from loractl.common.errors import UsageError, WrongState
from loractl.common.text import clean_line, signed
from loractl.common.units import duration, gib
from loractl.scheduler.text.screen import Screen, detect_screen, table

LEVEL = 0.05
MIN_ROWS = 8
"""Fewer rows are too few for an interval."""

_APART = {"name", "labels", "priority"}  # settings that decide nothing of the result


@dataclass(frozen=True, kw_only=True)
class Against:
    """How a job's held-out loss differs from the best one's: nats a token, with its 95% interval."""

    change: float
    low: float
    high: float
    p: float  # two-sided
    rows: int
    reading: str = ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One finished job."""

    job_id: int
    spec: dict[str, Any]
    report: dict[str, Any]
    against: Against | None = None  # None for the best one, and where the held-out rows are others

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The report's metrics by name."""
        return {metric["name"]: metric for metric in self.report["evaluation"]["metrics"]}

    @property
    def task(self) -> str:
        """The job's task_type; jobs that are older than the key learn to answer."""
        return str(self.spec.get("task_type", "CAUSAL_LM"))

    @property
    def loss(self) -> float:
        """Held-out loss of the tuned model; infinite where it could not be measured."""
        tuned = self.metrics["loss"]["tuned"]
        return math.inf if tuned is None else float(tuned)

    @property
    def rows(self) -> tuple[Any, ...] | None:
        """Equal for jobs that were measured on the same tokens. None for a report that does not say."""
        losses = self.report["evaluation"].get("row_losses")
        if not losses:
            return None
        return self.report["data"].get("held_out_sha256"), *((row, tokens) for row, tokens, *_ in losses)


@click.command()
@click.argument("job_ids", type=int, metavar="JOB...", nargs=-1)
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="The members of a sweep, and which of them is best.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw loss curves and changes into a PNG."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(job_ids: tuple[int, ...], sweep_id: int | None, plot: Path | None, as_json: bool) -> None:
    """Compare finished jobs: losses, memory, time, and their settings.

    The one with the least held-out loss leads; those that were measured on the same rows are compared with it, row by
    row.
    """
    if sweep_id is None and len(set(job_ids)) < 2:
        raise UsageError("there is nothing to compare", "name two jobs or more: loractl compare 12 13")
    if sweep_id is not None and job_ids:
        raise UsageError("--sweep compares the members of one sweep", f"alone: loractl compare --sweep {sweep_id}")
    if plot is not None:
        from loractl.scheduler.figure import require_matplotlib

        require_matplotlib("compare")
    if sweep_id is not None:
        jobs = _compare_members(sweep_id, as_json=as_json)
    else:
        found = [read_result(job_id) for job_id in dict.fromkeys(job_ids)]
        _check_one_task(found)
        jobs = ranked(found)
        click.echo(json.dumps(_as_json(jobs)) if as_json else _text(jobs, detect_screen()))
    if plot is not None:
        _draw(jobs, plot)
        click.echo(f"The picture is in {plot}.", err=True)


def _compare_members(sweep_id: int, *, as_json: bool) -> list[Compared]:
    """Print the finished members of a sweep, the stopped ones and the winner. Raises WrongState without a result."""
    from loractl.scheduler.answers import winner
    from loractl.scheduler.session import open_session

    view = open_session()[1].sweep(sweep_id)
    finished = [member.job_id for member in view.members if member.has_result]
    if not finished:
        raise WrongState(
            f"no member of sweep {sweep_id} has a result",
            f"loractl status --sweep {sweep_id} shows where they stand",
        )
    results = [read_result(job_id) for job_id in finished]
    _check_one_task(results)
    jobs = ranked(results)
    if as_json:
        click.echo(json.dumps({**_as_json(jobs), **winner.fields(view, jobs)}))
    else:
        click.echo(winner.text(view, jobs, detect_screen()))
    return jobs


def ranked(jobs: Sequence[Compared]) -> list[Compared]:
    """The best first, by held-out loss; those on the same rows as the best are compared with it, Holm-corrected."""
    order = sorted(jobs, key=lambda job: (job.loss, job.job_id))
    best = order[0]
    found = [
        replace(job, against=_difference(best, job)) if job is not best and job.rows and job.rows == best.rows else job
        for job in order
    ]
    return _holm(found)


def _difference(best: Compared, other: Compared) -> Against:
    """The change of the mean loss of a token, a ratio over rows, with its linearised variance (Cochran 1977, 6.9)."""
    mine, theirs = (job.report["evaluation"]["row_losses"] for job in (best, other))
    pairs = [(a[1], b[3] - a[3]) for a, b in zip(mine, theirs, strict=True) if None not in (a[3], b[3])]
    n, tokens = len(pairs), sum(weight for weight, _ in pairs)
    if not tokens:
        return Against(change=math.nan, low=math.nan, high=math.nan, p=1.0, rows=n)
    change = sum(loss for _, loss in pairs) / tokens
    if n < MIN_ROWS:
        return Against(change=change, low=math.nan, high=math.nan, p=1.0, rows=n)
    spread = math.sqrt(n / (n - 1) * math.fsum((loss - change * weight) ** 2 for weight, loss in pairs)) / tokens
    normal = statistics.NormalDist()
    reach = normal.inv_cdf(1 - LEVEL / 2) * spread
    p = 2 * (1 - normal.cdf(abs(change) / spread)) if spread > 0 else float(change == 0)
    return Against(change=change, low=change - reach, high=change + reach, p=p, rows=n)


def _holm(jobs: Sequence[Compared]) -> list[Compared]:
    """Each comparison's reading, at 5% for all of them together (Holm 1979)."""
    tested = sorted((job for job in jobs if job.against), key=lambda job: job.against.p if job.against else 0.0)
    readings: dict[int, str] = {}
    holds = True
    for place, job in enumerate(tested):
        assert job.against is not None
        holds = holds and job.against.p <= LEVEL / (len(tested) - place)
        few = job.against.rows < MIN_ROWS
        readings[job.job_id] = "too few rows" if few else "worse" if holds else "no clear difference"
    return [
        replace(job, against=replace(job.against, reading=readings[job.job_id])) if job.against else job for job in jobs
    ]


def differences(jobs: Sequence[Compared]) -> dict[str, list[Any]]:
    """The settings in which the jobs differ, each with its value by job."""
    flat = [dict(flat_settings(job.spec)) for job in jobs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key) for settings in flat] for key in keys if key not in _APART}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def flat_settings(tree: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """A spec's settings under dotted keys."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in ("labels",):
            found += flat_settings(value, f"{before}{key}.")
        else:
            found.append((before + key, value))
    return found


def read_result(job_id: int) -> Compared:
    """A finished job with its report. Raises WrongState while it has none."""
    from .report import result_of

    job, store, prefix = result_of(job_id)
    return Compared(job_id=job_id, spec=job.spec, report=store.read_json(prefix, "report.json"))


def _check_one_task(jobs: Sequence[Compared]) -> None:
    """A loss of tokens and one of labels are not of one kind. Raises UsageError."""
    tasks = {job.task: job.job_id for job in jobs}
    if len(tasks) > 1:
        one, other = tasks.values()
        raise UsageError(
            f"jobs {one} and {other} learn different tasks, so their losses can't be compared", "see task_type"
        )


def _text(jobs: Sequence[Compared], screen: Screen) -> str:
    others = [name for name in ("accuracy", "exact_match", "rougeL") if all(name in job.metrics for job in jobs)][:2]
    lines = table(
        ["JOB", "NAME", "METHOD", "LOSS", "AGAINST THE BEST", "READING", *(_title(jobs[0], n) for n in others),
         "PEAK GIB", "TIME"],
        [
            [
                str(job.job_id),
                clean_line(job.report["job"]["name"])[:28],
                job.report["method"],
                screen.style(number(job.loss, 3), bold=job is jobs[0]),
                change(job),
                reading(job, jobs[0]),
                *(number(job.metrics[name]["tuned"], 1) for name in others),
                gib(job.report["training"]["peak_memory_bytes"]),
                duration(job.report["wall_seconds"]),
            ]
            for job in jobs
        ],
        screen,
        right=("JOB", "LOSS", "PEAK GIB", "TIME", *(_title(jobs[0], n) for n in others)),
    )  # fmt: skip
    changed = differences(jobs)
    if changed:
        rows = [[key, *(clean_line(_value(value)) for value in values)] for key, values in changed.items()]
        lines += ["", *table(["SETTING", *(str(job.job_id) for job in jobs)], rows, screen)]
    else:
        lines += ["", "The jobs have the same settings."]
    compared = [job.against for job in jobs if job.against]
    if compared:
        of = "row" if jobs[0].task == "SEQ_CLS" else "token"
        note = f"Change of the held-out loss in nats a {of} on the same {compared[0].rows} rows, with its 95 % interval"
        lines += ["", screen.dim(f"{note}; readings at 5 % for all together (Holm).")]
    return "\n".join(lines)


def reading(job: Compared, best: Compared) -> str:
    if job is best:
        return "best" if job.rows else "least loss"
    return job.against.reading if job.against else "other held-out rows"


def change(job: Compared) -> str:
    if job.against is None:
        return ""
    a = job.against
    change = signed(a.change, 3)
    return change if math.isnan(a.low) else f"{change} ({signed(a.low, 3)} to {signed(a.high, 3)})"


def _title(job: Compared, name: str) -> str:
    metric = job.metrics[name]
    return str(metric["label"]).upper() + (" %" if metric["unit"] == "%" else "")


def number(value: float | None, digits: int) -> str:
    return "\N{EN DASH}" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"\N{HORIZONTAL ELLIPSIS}{text[-23:]}"


def _as_json(jobs: Sequence[Compared]) -> dict[str, Any]:
    return {
        "jobs": [
            {
                "job_id": job.job_id,
                "name": job.report["job"]["name"],
                "method": job.report["method"],
                "reading": reading(job, jobs[0]),
                "against_best": None
                if job.against is None
                else {
                    key: value if not isinstance(value, float) or math.isfinite(value) else None
                    for key, value in vars(job.against).items()
                },
                "metrics": job.report["evaluation"]["metrics"],
                "peak_memory_bytes": job.report["training"]["peak_memory_bytes"],
                "wall_seconds": job.report["wall_seconds"],
            }
            for job in jobs
        ],
        "differences": differences(jobs),
    }


def _draw(jobs: Sequence[Compared], path: Path) -> None:
    """Training losses of the jobs over their steps, and each one's change against the best."""
    from matplotlib.figure import Figure

    from loractl.scheduler.figure import save, without_box

    figure = Figure(figsize=(9, 4.2 + 0.35 * len(jobs)), dpi=120, layout="constrained")
    curves, changes = figure.subplots(2, 1, height_ratios=(10, 2 + len(jobs)))
    colors = ["#0b3d91", "#b5541c", "#3f9b8f", "#7a4fa3", "#8a8a8a"]
    for place, job in enumerate(jobs):
        style = {"color": colors[min(place, 4)], "linewidth": 2.0 if place == 0 else 1.3}
        points = [(s, v) for s, v in job.report["training"]["losses"] if v is not None]
        named = f"{job.job_id} {clean_line(job.report['job']['name'])}"
        curves.plot([s for s, _ in points], [v for _, v in points], label=named, **style)
        if job.against and math.isfinite(job.against.low):
            changes.plot([job.against.low, job.against.high], [-place, -place], **style)
        if job.against or place == 0:
            changes.plot([job.against.change if job.against else 0], [-place], "o", color=style["color"])
    curves.set_title("Training loss over the steps", loc="left", fontsize=10)
    curves.legend(loc="upper right", frameon=False, fontsize=9)
    changes.axvline(0, color="black", linewidth=0.8)
    changes.set_yticks([-n for n in range(len(jobs))], [str(job.job_id) for job in jobs])
    changes.set_title("Held-out loss against the best, 95 % interval (right: worse)", loc="left", fontsize=10)
    for axes in (curves, changes):
        without_box(axes)
    save(figure, path)
