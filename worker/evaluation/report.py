"""The evaluation report: every measured number as report.json, and as report.html, one self-contained page."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.artifacts import FINAL, sha256_of
from loractl.common.chart import forest, loss_chart
from loractl.common.job.kinds import kind_of
from loractl.common.job.sections import DataFormat
from loractl.common.job.spec import JobSpec
from loractl.common.text import signed
from loractl.common.units import amount, duration, gib, thousands
from loractl.common.verdict import RESEMBLE, RIGHT, answer_groups, badge, chose_step, report_verdict, rights, written
from loractl.worker.data.prepared import MeasuredRows, PreparedData
from loractl.worker.protocol.messages import Start
from loractl.worker.protocol.versions import installed_versions

from .answers import as_json
from .comparison import BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED, Compared

if TYPE_CHECKING:
    from jinja2 import Template

    from loractl.worker.base.model import Learner

    from .evaluation import Evaluation
    from .harness import Benchmarks


def render_html(report: dict[str, Any]) -> str:
    """The page: no script, no font, no picture from elsewhere; everything typed by people is escaped."""
    losses, held_out = report["training"]["losses"], report["training"]["eval_losses"]
    return page_template().render(
        report=report,
        charts=[
            (size, loss_chart([losses], held_out, width=width, height=height))
            for size, width, height in (("broad", 920, 290), ("narrow", 380, 260))
        ],
        forest=forest(report["evaluation"]["metrics"]),
        groups=answer_groups(report["evaluation"]["answers"]),
        badge=badge(report["verdict"]["reading"]),
        loss_of=kind_of(report.get("task_type")).loss_of,
    )


@functools.cache
def page_template() -> Template:
    """Compiled once per process: that takes longer than rendering the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["RIGHT"] = RIGHT
    environment.filters.update(
        amount=amount, duration=duration, gib=gib, rights=rights, signed=signed, thousands=thousands, written=written
    )
    return environment.from_string((files(__package__) / "report.html.jinja").read_text("utf-8"))


SCHEMA = 1
"""Version of report.json's format; a reader refuses a newer one."""

MOST_ROW_LOSSES = 10_000
"""The most rows whose own losses are kept, to compare jobs: 400 KB."""


def build_report(
    order: Start,
    base: dict[str, Any],
    learner: Learner,
    data: PreparedData,
    evaluation: Evaluation,
    training: dict[str, Any],
    wall_seconds: float,
    final: Evaluation | None = None,
) -> dict[str, Any]:
    """All measurements, and all that a repetition needs, as plain JSON values. `wall_seconds`: of this attempt.

    `schema`: the form's version; `job`: `job_id`, `name`, `user`, `attempt`, `node`, `gpu`, `device_name`, `labels`;
    `base_model`; `base`: its BaseIdentity, `commit`, `sha256` and `files`; `task_type`; `method` and `method_why`; the
    resolved `spec`; `verdict`; `adapter`: `r`, `lora_alpha`, `lora_dropout`, `init_from`, its `modules`,
    `trainable_parameters` of `total_parameters`, `bytes`, `sha256`; `data`, with `more_sha256`, `eval_sha256` and
    `regression_sha256` of the other files; `evaluation` on the held-out rows; `seed`; `wall_seconds`; `versions`;
    `final`: the evaluation on the final rows with `sha256` and `verdict`, which readers of reports leave out
    (`ArtifactStore.read_report`).

    `training`: `steps`, `resumed_from_step`, `stopped_early_at_step`, `kept_step` whose weights were kept, `epochs`,
    `seconds`, `tokens`, `tokens_per_second`; `peak_memory_bytes` and its `peak_memory_kind`, `peak_allocated_bytes` of
    tensors, `peak_process_bytes`, `vram_planned`, `vram_reserved`; `learning_rate`, `optim`; as they ended up
    `per_device_train_batch_size`, `gradient_accumulation_steps`, `per_device_eval_batch_size` and
    `gradient_checkpointing` (half: every second block); what a lack of memory changed: the `adjustment`, `changes` in
    words, and what was `asked`; the base's `precision`; `device`, `threads`, `cards` and how these shared the job
    (`parallel`); step and loss in `losses` and `eval_losses`; of an earlier version the `companions`, jobs in the same
    process.
    """
    spec, texts, measured = order.spec, data.format is DataFormat.TEXT, dict[str, Any]()
    if final is not None and data.final is not None:
        judged = _verdict_on(final, data.final, "final", texts=texts)
        measured[FINAL] = {"sha256": data.facts()["final_sha256"], "verdict": judged, **_evaluation(final)}
    return {
        "schema": SCHEMA,
        "job": _job(order),
        "base_model": spec.base_model,
        "base": base,
        "task_type": spec.task_type.value,
        "method": order.method.value,
        "method_why": order.method_why,
        "spec": spec.model_dump(mode="json"),
        "verdict": _verdict_on(evaluation, data.held_out, "held-out", _chosen(spec, training), texts=texts),
        "adapter": _adapter(order, learner.model),
        "data": {
            **data.facts(),
            "more_sha256": order.more_sha256,
            "eval_sha256": order.eval_sha256,
            "regression_sha256": order.regression_sha256,
        },
        "training": training,
        "evaluation": _evaluation(evaluation),
        **measured,
        "seed": spec.training.seed,
        "wall_seconds": wall_seconds,
        "versions": installed_versions(),
    }


def _chosen(spec: JobSpec, training: dict[str, Any]) -> list[str]:
    """A sentence if the held-out rows chose the adapter that they measure."""
    evaluations, stopped = len(training["eval_losses"]), training["stopped_early_at_step"] is not None
    if not chose_step(keeps_best=spec.training.load_best_model_at_end, evaluations=evaluations, stopped_early=stopped):
        return []
    return [f"These rows chose step {training['kept_step']}, so their loss is optimistic."]


def _verdict_on(
    found: Evaluation, rows: MeasuredRows, called: str, doubts: Sequence[str] = (), *, texts: bool
) -> dict[str, str]:
    """On an evaluation and the rows that it measured. Also doubted: what the job file's own measures leave out."""
    doubts = [*doubts, *rows.doubts(called), *(scores.doubt for scores in found.own if scores.doubt)]
    seen = {"resemble": rows.resemble, "read_off": rows.read_off}
    return verdict(found.metrics, found.against, doubts, called, found.given_away, texts=texts, **seen)


def verdict(
    metrics: list[Compared],
    base: str = "the base",
    doubts: Sequence[str] = (),
    rows: str = "held-out",
    given_away: int = 0,
    *,
    resemble: str = RESEMBLE,
    read_off: str = "",
    texts: bool = False,
) -> dict[str, str]:
    """What the comparison with `base` says: `reading`, `why`, `short`, `sentence`, and `aside`, what else got worse and
    what is known to be wrong with the measured rows."""
    told = [metric.as_json() for metric in metrics]
    return dict(
        vars(report_verdict(told, base, doubts, rows, given_away, resemble=resemble, read_off=read_off, texts=texts))
    )


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json and report.html."""
    (folder / "report.json").write_text(json.dumps(_finite(report), indent=1, allow_nan=False), "utf-8")
    (folder / "report.html").write_text(render_html(report), "utf-8")


def _job(order: Start) -> dict[str, Any]:
    return {
        "job_id": order.job_id,
        "name": order.spec.name,
        "user": order.user,
        "attempt": order.attempt,
        "node": order.node,
        "gpu": order.gpu,
        "device_name": order.device_name,
        "labels": dict(order.spec.labels),
    }


def _adapter(order: Start, model: Any) -> dict[str, Any]:
    trainable, total = model.get_nb_trainable_parameters()
    lora, folder = order.spec.lora, Path(order.output_dir) / "adapter"
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "init_from": order.init_from.lineage() if order.init_from else None,
        "modules": sorted(model.peft_config["default"].target_modules),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "sha256": sha256_of(folder / "adapter_model.safetensors"),
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Base against tuned on some rows.

    `rows`; `baseline`: what stands for the base, if that is not the base model; `base_measured_by_job` and
    `base_measured_at`: the earlier measurement of the base that was used, with equal losses of
    `base_rows_measured_again`; `seconds`; `bootstrap`: `samples`, `seed` and `interval`; `metrics`: measures;
    `row_losses`: of each row its number, weight, summed loss of the base and of the tuned model; `answers`: sampled
    rows with `row`, `prompt`, `expected`, `base`, `tuned`, `base_ended`, `tuned_ended`, `rejected`, `base_exact`,
    `tuned_exact`, and by measures of the job file `scores` and `decided`; `labels`: of a classifier the `names`, and
    rows by expected and given label of `base` and `tuned`; `cheap`: how many training examples the base was shown
    besides; `turns`: of conversations with several answers the `cases` and losses of `base` and `tuned` by `turn`;
    `lm_eval`: what the harness measured.
    """
    labels, earlier = evaluation.labels, evaluation.base_measured
    return {
        "rows": evaluation.rows,
        "baseline": evaluation.baseline,
        "base_measured_by_job": earlier and earlier.job_id,
        "base_measured_at": earlier and earlier.at.isoformat(),
        "base_rows_measured_again": earlier and earlier.checked,
        "seconds": evaluation.seconds,
        "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "seed": BOOTSTRAP_SEED, "interval": 0.95},
        "metrics": [m.as_json() for m in evaluation.metrics],
        "row_losses": evaluation.row_losses[:MOST_ROW_LOSSES],
        "answers": [
            {
                **vars(answer),
                "base_exact": answer.base_exact,
                "tuned_exact": answer.tuned_exact,
                **as_json(evaluation.own, place),
            }
            for place, answer in enumerate(evaluation.answers)
        ],
        "labels": None
        if labels is None
        else {"names": labels.names, "base": labels.confusion(labels.base), "tuned": labels.confusion(labels.tuned)},
        "cheap": evaluation.cheap,
        "turns": [vars(turn) for turn in evaluation.turns],
        "lm_eval": _benchmarks(evaluation.benchmarks),
    }


def _benchmarks(benchmarks: Benchmarks | None) -> dict[str, Any] | None:
    if benchmarks is None:
        return None
    metrics = [{**s.compared.as_json(), **vars(s), "reading": s.reading} for s in benchmarks.scored]
    for metric in metrics:
        del metric["compared"]
    return {**{key: value for key, value in vars(benchmarks).items() if key != "scored"}, "metrics": metrics}


def _finite(value: Any) -> Any:
    """JSON has no NaN: an unmeasurable number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
