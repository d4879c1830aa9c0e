"""The model card: README.md beside the weights, in place of peft's empty form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loractl.common.adapter_config import portable_name
from loractl.worker.base.adapter import LABELS

CARD_LABELS = 20
"""So many labels a model card lists; labels.json has them all."""


def write_model_card(report: dict[str, Any], adapter: Path) -> None:
    """What this adapter is and where it comes from."""
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
        *(_how_to_classify(report["base_model"], list(data["labels"])) if data.get("labels") else ()),
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
    (adapter / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def _begun_from(ancestor: dict[str, Any]) -> str:
    return f"- begun from the adapter of {ancestor['name']} (job {ancestor['job_id']}), sha256 {ancestor['sha256']}"


def _how_to_classify(base: str, labels: list[str]) -> list[str]:
    """How a classifier is loaded: the base gets a head of its labels and the padding token, the adapter the weights."""
    name = portable_name(base)
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
