"""The model card: README.md next to an adapter's weights, short for the lab and a whole report for a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from .adapter_config import LABELS, portable_name
from .data.giveaway import unquoted
from .text import clean_line, number, signed
from .units import thousands
from .verdict import written

if TYPE_CHECKING:
    from .job.spec import JobSpec

CARD_LABELS = 20
"""The most labels that a model card lists; labels.json has them all."""

CARD_MODULES = 20


@dataclass(frozen=True, kw_only=True)
class License:
    """A license as the front matter of a hub's README.md has it."""

    id: str  # like apache-2.0; other: more says which
    more: Mapping[str, str] = field(default_factory=dict)  # license_name, license_link


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a card on a hub says in addition to the report."""

    repository: str  # owner/name
    base: str | None  # the base's name on the hub; None: not known
    license: License | None  # the base's; None: not known
    datasets: Sequence[str]  # those of the hub
    final: str  # what the final rows say; empty where there are none


def lab_card(report: dict[str, Any]) -> str:
    """What an adapter is and which job of the lab made it."""
    base, data, training = report["base_model"].rpartition("/")[2], report["data"], report["training"]
    loss = next(m for m in report["evaluation"]["metrics"] if m["name"] == "loss")
    baseline = report["evaluation"].get("baseline")
    hashes = [data["sha256"], *data["more_sha256"]]
    losses = (
        f"{'base' if baseline is None else baseline.partition(', ')[0]} {loss['base']:.4f}, tuned {loss['tuned']:.4f}"
    )
    lines = [
        "---",
        "library_name: peft",
        "---",
        f"# {report['job']['name']}",
        "",
        f"A {report['method']} adapter (r {report['adapter']['r']}) for {base}, made by loractl job "
        f"{report['job']['job_id']}, attempt {report['job']['attempt']}.",
        *(_classifier(portable_name(report["base_model"]), '"."', data) if data.get("labels") else ()),
        "",
        f"- {report['verdict']['sentence']}",
        *(f"- {aside}" for aside in [report["verdict"].get("aside")] if aside),
        f"- held-out {loss['label']} on {report['evaluation']['rows']} rows: {losses}",
        f"- {training['steps']} steps at learning rate {training['learning_rate']:g}, batch "
        f"{training['per_device_train_batch_size']} x {training['gradient_accumulation_steps']}, seed {report['seed']}",
        f"- data: {data['train_rows']} rows, sha256 {', '.join(one or 'unknown (from the hub)' for one in hashes)}",
        *(f"- {told}" for told in data["sources"]),
        *(_begun_from(from_) for from_ in [report["adapter"].get("init_from")] if from_),
        f"- weights: sha256 {report['adapter']['sha256']}",
        "- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]
    return "\n".join(lines) + "\n"


def hub_card(report: dict[str, Any], spec: JobSpec, published: Published) -> str:
    """The report for readers outside the lab: no rows, no names of its people, machines, jobs, folders or files."""
    name, base = published.repository.partition("/")[2], published.base or portable_name(report["base_model"])
    adapter, loractl = report["adapter"], report["versions"].get("loractl")
    local = "" if published.base else ", a folder whose name on the hub is not known"
    lines = [
        "---",
        *_front_matter(report, spec, published).splitlines(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {_METHODS[report['method']]} adapter (r {adapter['r']}, lora_alpha {adapter['lora_alpha']:g}) for "
        f"`{base}`{local}, trained with loractl{f' {loractl}' if loractl else ''}.",
        "",
        *_result(report, published.final),
        *_benchmarks(report["evaluation"].get("lm_eval")),
        "",
        "## Use",
        *_use(report, spec, published),
        "",
        "## Training",
        "",
        *_table(("setting", "value"), _settings(report, spec)),
        "",
        "## Data",
        "",
        *_data(report, published),
        "",
        "## License",
        "",
        _license(base, published.license),
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        f"Weights: sha256 `{adapter['sha256']}`.",
    ]
    return "".join(f"{clean_line(line)}\n" for line in lines)  # a name that a worker wrote must not add a line


_METHODS = {"lora": "LoRA", "qlora": "QLoRA"}

_LOSS_TAGS = {"sigmoid": "dpo"}
"""What the hub's readers call a loss of pairs, if they have another word."""


def _begun_from(ancestor: dict[str, Any]) -> str:
    return f"- begun from the adapter of {ancestor['name']} (job {ancestor['job_id']}), sha256 {ancestor['sha256']}"


def _of_pairs(spec: JobSpec) -> bool:
    return spec.kind.loss_of == "pair"


def _front_matter(report: dict[str, Any], spec: JobSpec, published: Published) -> str:
    losses = [_LOSS_TAGS.get(loss, loss) for loss in spec.preference.losses] if _of_pairs(spec) else []
    known = published.license
    content = {
        **({"base_model": published.base, "base_model_relation": "adapter"} if published.base else {}),
        **({"datasets": list(published.datasets)} if published.datasets else {}),
        "library_name": "peft",
        **({"license": known.id, **known.more} if known else {}),
        "pipeline_tag": "text-generation" if spec.kind.writes else "text-classification",
        "tags": list(dict.fromkeys(["lora", report["method"], *losses, "loractl"])),
    }
    return yaml.safe_dump(content, sort_keys=True, allow_unicode=True).strip()


def _result(report: dict[str, Any], final: str) -> Iterator[str]:
    """The verdict, and every measure with its interval."""
    verdict, evaluation = report["verdict"], report["evaluation"]
    yield " ".join(filter(None, [f"**{verdict['sentence']}**", *map(unquoted, [verdict.get("aside") or "", final])]))
    yield ""
    rows = []
    for metric in evaluation["metrics"]:
        shown = written(metric)
        label = metric["label"] + (f", {metric['unit']}" if metric["unit"] else "")
        rows.append((label, shown.base, shown.tuned, shown.change, shown.interval, shown.reading))
    yield from _table(("measure", "base", "tuned", "change", "95 % interval", "reading"), rows)
    count, drawn = evaluation["rows"], evaluation["bootstrap"]
    yield ""
    yield (
        f"Measured on {count} held-out row{'s' * (count != 1)}, which were never trained on. Intervals of the change: "
        f"{thousands(drawn['samples'])} paired bootstrap samples, seed {drawn['seed']}."
    )
    if baseline := evaluation.get("baseline"):
        of_shares = "" if report["data"].get("labels") is None else ", as sure as its share of the training rows"
        yield f'"Base" is {baseline}{of_shares}.'


def _benchmarks(harness: dict[str, Any] | None) -> Iterator[str]:
    """The lm-eval harness's tasks, where some were asked for."""
    if not harness:
        return
    rows = []
    for metric in harness["metrics"]:
        if metric["group"] is None:
            low, high, change = (signed(metric[key], 3) for key in ("low", "high", "change"))
            base, tuned = (number(metric[key], 3) for key in ("base", "tuned"))
            rows.append((metric["label"], base, tuned, change, f"{low} to {high}", metric["reading"]))
    yield ""
    yield from _table(("lm-eval task", "base", "tuned", "change", "95 % interval", "reading"), rows)
    yield ""
    limit = "all rows" if harness["limit"] is None else f"at most {thousands(harness['limit'])} rows"
    yield f"lm_eval {harness['version']}, {limit} of each task."


def _use(report: dict[str, Any], spec: JobSpec, published: Published) -> Iterator[str]:
    """How transformers and peft load it."""
    repository, base = json.dumps(published.repository), json.dumps(published.base or "/path/to/the/base")
    if not spec.kind.writes:
        yield from _classifier(
            published.base or "/path/to/the/base", f"snapshot_download({repository})", report["data"]
        )
        return
    yield ""
    yield from (
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base, adapter = {base}, {repository}",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")',
        "model = PeftModel.from_pretrained(model, adapter).eval()",
        "```",
    )


def _settings(report: dict[str, Any], spec: JobSpec) -> Iterator[tuple[str, str]]:
    """What was trained and how, by the names of peft, transformers and TRL."""
    adapter, training, asked = report["adapter"], report["training"], spec.training
    modules = adapter["modules"]
    more = f", and {len(modules) - CARD_MODULES} more" if len(modules) > CARD_MODULES else ""
    commit = (report.get("base") or {}).get("commit") or spec.revision
    rows = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    yield "method", report["method"]
    yield "task_type", spec.task_type.value
    if commit:
        yield "base's commit", commit
    yield "r", str(adapter["r"])
    yield "lora_alpha", f"{adapter['lora_alpha']:g}"
    yield "lora_dropout", f"{adapter['lora_dropout']:g}"
    yield "target_modules", ", ".join(modules[:CARD_MODULES]) + more
    for key in ("use_dora", "use_rslora"):
        if getattr(spec.lora, key):
            yield key, "true"
    if spec.lora.modules_to_save:
        yield "modules_to_save", ", ".join(spec.lora.modules_to_save)
    if adapter.get("init_from"):
        yield "begun from", f"another adapter, sha256 {adapter['init_from']['sha256']}"
    if _of_pairs(spec):
        yield "loss_type", ", ".join(spec.preference.losses)
        yield "beta", f"{spec.preference.beta:g}"
    yield "learning_rate", f"{training['learning_rate']:g}"
    yield "lr_scheduler_type", asked.lr_scheduler_type
    if asked.max_steps is None and asked.num_train_epochs is not None:
        yield "num_train_epochs", f"{asked.num_train_epochs:g}"
    yield "steps", str(training["steps"])
    if (kept := training.get("kept_step", training["steps"])) != training["steps"]:
        yield "kept step", str(kept)
    yield "batch", f"{rows[0] * rows[1]} rows ({rows[0]} x {rows[1]})"
    yield "max_length", f"{spec.dataset.max_length} tokens"
    yield "optim", training["optim"]
    yield "dtype", training["precision"]
    yield "seed", str(report["seed"])


def _data(report: dict[str, Any], published: Published) -> Iterator[str]:
    """The rows by number, form and hash."""
    data = report["data"]
    hashes = [one for one in (data["sha256"], *data.get("more_sha256", ())) if one]
    yield f"- {data['train_rows']} rows to train on, {data['held_out_rows']} held out ({data['format']})"
    yield from (f"- sha256 `{one}`" for one in hashes)
    yield from (f"- from the hub: `{name}`" for name in published.datasets)
    if left_out := sum(data.get(f"{why}_rows_dropped", 0) for why in ("too_long", "bad", "overlap", "repeated")):
        yield f"- {left_out} rows left out"
    if data["truncated_rows"]:
        yield f"- {data['truncated_rows']} rows cut at max_length"


def _license(base: str, known: License | None) -> str:
    if known is None:
        return f"Unknown: the license of `{base}` is not known here. It may limit what this adapter may be used for."
    named = " ".join([known.id, *(f"({value})" for value in known.more.values())])
    return f"That of the base, `{base}`: {named}."


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _classifier(base: str, adapter: str, data: dict[str, Any]) -> list[str]:
    """How a classifier is loaded: the base gets a head of its labels and the padding token, the adapter the weights.
    `adapter`: as Python has it."""
    labels = list(data["labels"])
    told = ", ".join(json.dumps(name, ensure_ascii=False) for name in labels[:CARD_LABELS])
    more = f", and {len(labels) - CARD_LABELS} more" if len(labels) > CARD_LABELS else ""
    return [
        f"It classifies texts, with a head of its own: {told}{more}.",
        "",
        "```python",
        "import json",
        "from pathlib import Path",
        "",
        *(["from huggingface_hub import snapshot_download"] if "snapshot_download" in adapter else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"base, adapter = {json.dumps(base)}, {adapter}",
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
