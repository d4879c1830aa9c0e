"""The evaluation report: report.json with every number, and report.html, one page that stands alone."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.artifacts import sha256_of
from loractl.common.job.adjustment import Adjustment
from loractl.common.text import signed
from loractl.common.units import duration, gib, thousands
from loractl.worker.base.adapter import LABELS
from loractl.worker.device.versions import installed_versions

from .classifier import BASELINE
from .evaluation import Compared, Evaluation
from .statistics import BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED

if TYPE_CHECKING:
    from loractl.worker.base.arithmetic import Precision
    from loractl.worker.data.prepared import PreparedData
    from loractl.worker.protocol.messages import Peaks, Start
    from loractl.worker.training.recipe import TrainingLog

    from .harness import Benchmarks

SCHEMA = 1
"""Version of report.json's form; a reader refuses a newer one."""

MOST_ROW_LOSSES = 10_000
"""So many rows' own losses are kept, to compare jobs by: 400 KB."""

CARD_LABELS = 20
"""So many labels a model card lists; labels.json has them all."""

MIN_POINTS_TO_SMOOTH = 40
"""A smoothed line through fewer points lags behind them and misleads."""


def build_report(
    order: Start,
    *,
    base: dict[str, Any],
    data: PreparedData,
    evaluation: Evaluation,
    log: TrainingLog,
    arguments: Any,
    model: Any,
    precision: Precision,
    adjustment: Adjustment,
    changes: list[str],
    peaks: Peaks,
    peak_kind: str,
    threads: int,
    adapter_dir: Path,
    wall_seconds: float,
) -> dict[str, Any]:
    """Everything that was measured, and all that is needed to run it again, as plain JSON values.

    `base`: what `identify` says of the base model.
    """
    trainable, total = model.get_nb_trainable_parameters()
    spec = order.spec
    return {
        "schema": SCHEMA,
        "job": {
            "job_id": order.job_id,
            "name": spec.name,
            "user": order.user,
            "attempt": order.attempt,
            "node": order.node,
            "gpu": order.gpu,
            "device_name": order.device_name,
            "labels": dict(spec.labels),
        },
        "base_model": spec.base_model,
        "base": base,
        "task_type": spec.task_type.value,
        "method": order.method.value,
        "method_why": order.method_why,
        "spec": spec.model_dump(mode="json"),
        "verdict": verdict(evaluation.metrics, "the base" if evaluation.baseline is None else BASELINE),
        "adapter": {
            "r": spec.lora.r,
            "lora_alpha": spec.lora.lora_alpha,
            "lora_dropout": spec.lora.lora_dropout,
            "modules": sorted(model.peft_config["default"].target_modules),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "bytes": sum(f.stat().st_size for f in adapter_dir.glob("*.safetensors")),
            "sha256": sha256_of(adapter_dir / "adapter_model.safetensors"),
        },
        "data": {
            **data.facts(),
            "eval_sha256": order.eval_sha256,
            "regression_sha256": order.regression_sha256,
        },
        "training": {
            "steps": log.steps,
            "resumed_from_step": log.first_step or None,
            "stopped_early_at_step": log.stopped_early,
            "kept_step": log.best[0] if log.best and spec.training.load_best_model_at_end else log.steps,
            "epochs": spec.training.num_train_epochs,
            "seconds": log.seconds,
            "tokens": log.tokens_seen,
            "tokens_per_second": log.tokens_per_second,
            "peak_memory_bytes": peaks.reserved,
            "peak_memory_kind": peak_kind,
            "peak_allocated_bytes": peaks.allocated,
            "peak_process_bytes": peaks.process,
            "vram_planned": order.vram_planned,
            "vram_reserved": order.vram_reserved,
            "learning_rate": spec.training.learning_rate,
            "optim": arguments.optim.value,
            "per_device_train_batch_size": arguments.per_device_train_batch_size,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "per_device_eval_batch_size": arguments.per_device_eval_batch_size,
            "adjustment": adjustment.as_json(),
            "changes": changes,
            "asked": {
                "per_device_train_batch_size": spec.training.per_device_train_batch_size,
                "gradient_accumulation_steps": spec.training.gradient_accumulation_steps,
                "gradient_checkpointing": spec.training.gradient_checkpointing,
                "per_device_eval_batch_size": spec.evaluation.per_device_eval_batch_size,
            },
            "gradient_checkpointing": arguments.activation_checkpointing,
            "precision": str(precision.base).removeprefix("torch."),
            "device": order.device,
            "threads": threads,
            "losses": log.train_losses,
            "eval_losses": log.eval_losses,
        },
        "evaluation": {
            "rows": evaluation.rows,
            "baseline": evaluation.baseline,
            "seconds": evaluation.seconds,
            "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "seed": BOOTSTRAP_SEED, "interval": 0.95},
            "metrics": [_metric(m) for m in evaluation.metrics],
            "row_losses": evaluation.row_losses[:MOST_ROW_LOSSES],
            "answers": [
                {**vars(a), "base_exact": a.base_exact, "tuned_exact": a.tuned_exact} for a in evaluation.answers
            ],
            "labels": None
            if evaluation.labels is None
            else {
                "names": evaluation.labels.names,
                "base": evaluation.labels.confusion(evaluation.labels.base),
                "tuned": evaluation.labels.confusion(evaluation.labels.tuned),
            },
            "turns": [vars(turn) for turn in evaluation.turns],
            "lm_eval": _benchmarks(evaluation.benchmarks),
        },
        "seed": spec.training.seed,
        "wall_seconds": wall_seconds,
        "versions": installed_versions(),
    }


def verdict(metrics: list[Compared], base: str = "the base") -> dict[str, str]:
    """What the comparison with `base` says, in a word and a sentence. The held-out loss decides; the rest is named
    beside it."""
    loss = next(m for m in metrics if m.name == "loss")
    numbers = f"held-out loss {loss.base:.2f} -> {loss.tuned:.2f}"
    short = f"loss {loss.base:.2f} -> {loss.tuned:.2f}"
    worse = [m.label for m in metrics if m.reading == "worse" and m.name not in ("loss", "perplexity")]
    aside = f"; worse on {' and '.join(worse)}" if worse else ""
    if loss.reading == "too few cases":
        return {
            "reading": "no_measurable_gain",
            "short": f"too few held-out rows to say, {short}",
            "sentence": f"Too few held-out rows ({loss.cases}) to say whether it is better: {numbers}.",
        }
    if loss.reading == "no clear change":
        return {
            "reading": "no_measurable_gain",
            "short": f"no measurable gain, {short}",
            "sentence": f"No measurable gain: {numbers}, and the interval of the change holds zero{aside}.",
        }
    if loss.reading == "worse":
        return {
            "reading": "worse",
            "short": f"worse, {short}",
            "sentence": f"No measurable gain: worse than {base}, {numbers}{aside}.",
        }
    return {"reading": "better", "short": f"better, {short}", "sentence": f"Better than {base}: {numbers}{aside}."}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json and report.html."""
    (folder / "report.json").write_text(json.dumps(_finite(report), indent=1, allow_nan=False), "utf-8")
    (folder / "report.html").write_text(render_html(report), "utf-8")


def write_model_card(report: dict[str, Any], adapter: Path) -> None:
    """README.md beside the weights, in place of peft's empty form: what this adapter is and where it comes from."""
    base, data, training = report["base_model"].rpartition("/")[2], report["data"], report["training"]
    loss = next(m for m in report["evaluation"]["metrics"] if m["name"] == "loss")
    baseline = report["evaluation"].get("baseline")
    losses = f"{'base' if baseline is None else BASELINE} {loss['base']:.4f}, tuned {loss['tuned']:.4f}"
    lines = [
        "---",
        "library_name: peft",
        "---",
        f"# {report['job']['name']}",
        "",
        f"A {report['method']} adapter (r {report['adapter']['r']}) for {base}, made by loractl job "
        f"{report['job']['job_id']}, attempt {report['job']['attempt']}.",
        *(_how_to_classify(report["base_model"], list(data["labels"])) if data.get("labels") else ()),
        "",
        f"- {report['verdict']['sentence']}",
        f"- held-out loss on {report['evaluation']['rows']} rows: {losses}",
        f"- {training['steps']} steps at learning rate {training['learning_rate']:g}, batch "
        f"{training['per_device_train_batch_size']} x {training['gradient_accumulation_steps']}, seed {report['seed']}",
        f"- data: {data['train_rows']} rows, sha256 {data['sha256'] or 'unknown (from the hub)'}",
        f"- weights: sha256 {report['adapter']['sha256']}",
        "- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]
    (adapter / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def _how_to_classify(base: str, labels: list[str]) -> list[str]:
    """How a classifier is loaded: the base gets a head of its labels and the padding token, the adapter the weights."""
    name = base.rpartition("/")[2] if base.startswith("/") else base  # a hub id whole, of this box's folders the last
    told = ", ".join(json.dumps(name, ensure_ascii=False) for name in labels[:CARD_LABELS])
    more = f", and {len(labels) - CARD_LABELS} more" if len(labels) > CARD_LABELS else ""
    return [
        f"It classifies texts, with a head of its own: {told}{more}.",
        "",
        "```python",
        "import json",
        "from pathlib import Path",
        "",
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f'base, adapter = {json.dumps(name)}, "."',
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        f'labels = json.loads(Path(adapter, "{LABELS}").read_text())',
        "model = AutoModelForSequenceClassification.from_pretrained(",
        "    base,",
        "    num_labels=len(labels),",
        "    id2label=dict(enumerate(labels)),",
        "    label2id={name: place for place, name in enumerate(labels)},",
        "    pad_token_id=tokenizer.pad_token_id,",
        ")",
        "model = PeftModel.from_pretrained(model, adapter).eval()",
        "```",
    ]


def render_html(report: dict[str, Any]) -> str:
    """The page: no script, no font, no picture from elsewhere; everything typed by people is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(duration=duration, gib=gib, thousands=thousands, signed=signed)
    template = environment.from_string((files(__package__) / "report.html.jinja").read_text("utf-8"))
    return template.render(
        report=report,
        chart=loss_chart(report["training"]),
        forest=_forest(report["evaluation"]["metrics"]),
        groups=_groups(report["evaluation"]["answers"]),
    )


def loss_chart(training: dict[str, Any]) -> dict[str, Any]:
    """Coordinates of the loss curve in a 920 x 270 picture, and its axes' labels."""
    points = [(s, v) for s, v in training["losses"] if math.isfinite(v)]
    evals = [(s, v) for s, v in training["eval_losses"] if math.isfinite(v)]
    if not points:
        return {"raw": "", "smooth": "", "evals": [], "x": [], "y": [], "last": None}
    values = [v for _, v in points + evals]
    low, high = _ticks(min(values), max(values))
    last_step = max(s for s, _ in points + evals)

    def at(step: float, value: float) -> tuple[float, float]:
        return round(40 + 800 * step / max(1, last_step), 1), round(14 + 220 * (high - value) / (high - low), 1)

    def path(line: list[tuple[int, float]]) -> str:
        return "M" + "L".join(f"{x} {y}" for x, y in (at(s, v) for s, v in line))

    smooth, mean = [], points[0][1]
    for step, value in points if len(points) >= MIN_POINTS_TO_SMOOTH else ():
        mean = 0.7 * mean + 0.3 * value
        smooth.append((step, mean))
    grid = [low + (high - low) * n / 4 for n in range(5)]
    return {
        "raw": path(points),
        "smooth": path(smooth) if smooth else "",
        "line": path(evals) if len(evals) > 1 else "",
        "evals": [(*at(s, v), s, v) for s, v in evals],
        "x": [(at(last_step * n / 4, low)[0], thousands(round(last_step * n / 4))) for n in range(5)],
        "y": [(at(0, v)[1], f"{v:.2f}") for v in grid],
        "last": (*at(*points[-1]), f"{points[-1][1]:.2f}"),
    }


def _forest(metrics: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each metric, its interval on an axis of its own unit: left end, point and right end in 0..100, base at 50."""
    rows = {}
    for m in metrics:
        reach = max(abs(m["low"]), abs(m["high"]), abs(m["change"]), 1e-9) * 1.1 if m["low"] is not None else 1.0
        rows[m["name"]] = {key: 50 + 50 * (m[key] or 0.0) / reach for key in ("low", "change", "high")}
    return rows


def _groups(answers: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(key, title, answers) by what changed: repaired and broken first."""
    kinds = [
        ("repaired", "base wrong, tuned right", False, True),
        ("broken", "base right, tuned wrong", True, False),
        ("wrong", "both wrong", False, False),
        ("right", "both right", True, True),
    ]
    return [
        (key, title, [a for a in answers if (a["base_exact"], a["tuned_exact"]) == (b, t)])
        for key, title, b, t in kinds
    ]


def _metric(m: Compared) -> dict[str, Any]:
    return {**vars(m), "change": m.change, "reading": m.reading}


def _benchmarks(found: Benchmarks | None) -> dict[str, Any] | None:
    if found is None:
        return None
    metrics = [{**_metric(one.compared), **vars(one), "reading": one.reading} for one in found.scored]
    for metric in metrics:
        del metric["compared"]
    return {**{key: value for key, value in vars(found).items() if key != "scored"}, "metrics": metrics}


def _ticks(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis, rounded outwards to a step that people read easily."""
    span = max(high - low, 0.1)
    step = 10 ** math.floor(math.log10(span)) / 2
    return math.floor(low / step) * step, math.ceil(high / step) * step + (step if high == low else 0)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a number that could not be had is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
