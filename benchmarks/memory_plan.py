"""Score the memory plan on published runs: python -m benchmarks.memory_plan PATH/measured.csv [--architectures PATH].

Headline: LoRA and NF4 QLoRA on one GPU by transformers' Trainer or a plain loop with peft, rows of quality A and B
whose batch, length, checkpointing and optimizer are stated. What other stacks measured (Unsloth, torchtune, litgpt,
axolotl, ms-swift, GPTQ bases, Liger's fused loss, several GPUs) is listed below it.

Only the rows of SEEN were looked at while the plan was written; all others were set aside before.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.memory.families import shape_of
from loractl.common.memory.plan import Plan, plan
from loractl.common.memory.shape import Shape
from loractl.common.memory.step import Stack
from loractl.common.units import GIB

SEEN = "t4-sweep"
"""The source (a part of its name) whose rows were looked at."""

PLAIN_STACKS = {"hf+peft", "hf-trainer+peft", "trl+peft"}

CARDS = {"1xA10G 24GB": 22.2 * GIB}
"""What torch's own out-of-memory messages give as the card's total capacity."""

TOLERANCE = 0.05
"""A row counts as under-predicted when plan and margin together are more than this below what was measured."""

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b-chat": {**LLAMA, "sizes": (2048, 22, 32, 4, 5632, 32000)},
    "smollm2-1.7b": {**LLAMA, "sizes": (2048, 24, 32, 32, 8192, 49152), "tie_word_embeddings": True},
    "smollm2-360m": {**LLAMA, "sizes": (960, 32, 15, 5, 2560, 49152), "tie_word_embeddings": True},
    "smollm2-135m": {**LLAMA, "sizes": (576, 30, 9, 3, 1536, 49152), "tie_word_embeddings": True},
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "sizes": (1536, 28, 12, 2, 8960, 151936),
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {"model_type": "qwen2", "sizes": (3584, 28, 28, 4, 18944, 152064), "tie_word_embeddings": False},
    "gemma-7b": {"model_type": "gemma", "sizes": (3072, 28, 16, 16, 24576, 256000), "head_dim": 256},
    "gemma-2-9b": {"model_type": "gemma2", "sizes": (3584, 42, 16, 8, 14336, 256000), "head_dim": 256},
    "gemma-2b": {"model_type": "gemma", "sizes": (2048, 18, 8, 1, 16384, 256000), "head_dim": 256},
    "phi-3-mini": {"model_type": "phi3", "sizes": (3072, 32, 32, 32, 8192, 32064)},
}
"""config.json of models that the rows name: hidden, layers, heads, key heads, MLP width, vocabulary."""

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)

FUSED_NAMES = {"c_attn": ("q_proj", "k_proj", "v_proj"), "c_proj": ("o_proj", "down_proj"), "w1": ("gate_proj",)}
FUSED_NAMES |= {"w2": ("up_proj",), "query": ("q_proj",), "key": ("k_proj",), "value": ("v_proj",)}
SHORT_NAMES = {name[0]: (name,) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
"""Names of LoRA targets in the rows, in Llama's terms."""

Metric = Callable[[Plan], int]
METRICS: dict[str, Metric] = {
    "allocated": lambda p: p.tensor_bytes,
    "reserved": lambda p: p.peak_bytes - p.parts["context"],
    "process": lambda p: p.peak_bytes,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published run."""

    source: str
    model: str
    fields: dict[str, str]
    notes: dict[str, str]

    @property
    def quality(self) -> str:
        return self.notes.get("quality", "?")

    @property
    def held_out(self) -> bool:
        return SEEN not in self.source

    @property
    def metric(self) -> str:
        """Where a source does not say what it read, it is taken to be what the card shows."""
        told = self.notes.get("metric", "")
        return "allocated" if "allocated" in told else "reserved" if "reserved" in told else "process"

    def measured(self, metric: str) -> float | None:
        """Bytes by a metric, where the row has it."""
        if metric == self.metric:
            return float(self.fields["peak_gb"]) * 1e9 if self.fields["peak_gb"] else None
        other = self.notes.get({"reserved": "reserved_mib", "process": "process_mib"}.get(metric, ""))
        return float(other) * 2**20 if other and other != "None" else None


@dataclass(frozen=True, kw_only=True)
class Score:
    """A row's prediction beside its measurement, in bytes."""

    row: Row
    predicted: int
    margin: int
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def under(self) -> bool:
        return self.predicted + self.margin < (1 - TOLERANCE) * self.measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--architectures", type=Path, help="JSON of config.json by name (default: beside the rows)")
    parser.add_argument("--rows", metavar="PART", help="list the rows of sources with this in their name")
    parser.add_argument("--seen-only", action="store_true", help="leave out what is set aside")
    given = parser.parse_args()
    shapes = read_shapes(given.architectures or given.measured.parent / "architectures.json")
    rows = [row for row in read_rows(given.measured) if not (given.seen_only and row.held_out)]
    headline = [row for row in rows if why_not(row) is None]

    print("headline, by the metric that each row published")
    scores = table(headline, shapes, None)
    for metric in ("reserved", "process"):
        print(f"\nthe same runs by {metric} memory, where published beside it")
        table([row for row in headline if metric != row.metric], shapes, metric)
    print("\nother stacks and settings (not in the headline)")
    other = [r for r in rows if (why_not(r) or "").startswith("other") and r.fields["method"] in ("lora", "qlora")]
    table(other, shapes, None)
    print("\nrows that ran out of memory")
    for row in rows:
        if "OOM" in row.notes.get("kind", ""):
            print(f"  {row.model}, {row.fields['method']}: {out_of_memory(row, shapes)}")
    if given.rows:
        print()
        for score in scores:
            if given.rows in score.row.source:
                f = score.row.fields
                print(
                    f"  {score.row.model:34} {f['method']:5} {f['quant']:5} {f['batch']:>2} x {f['seq_len']:>5} "
                    f"{f['grad_ckpt'][:3]:3} {score.row.notes.get('kernel', ''):5} {score.measured / 1e9:7.2f} GB "
                    f"{score.error:+7.1%} {'under' if score.under else ''}"
                )


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [Row(source=r["source"], model=r["model"], fields=r, notes=_notes(r["notes"])) for r in rows]


def read_shapes(path: Path) -> dict[str, Shape]:
    """Shapes by a model's name in lower case."""
    configs: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for name, config in PUBLISHED.items():
        sizes = dict(zip(SIZES, config["sizes"], strict=True))
        configs.setdefault(name, {**sizes, **{k: v for k, v in config.items() if k != "sizes"}})
    found = {name.lower(): shape_of(config) for name, config in configs.items()}
    return {name: shape for name, shape in found.items() if shape is not None}


def why_not(row: Row) -> str | None:
    """Why a row is not in the headline; None for one that is."""
    f = row.fields
    if f["method"] not in ("lora", "qlora"):
        return f"method {f['method']}"
    if not f["peak_gb"] or row.notes.get("kind") != "measured":
        return "no measurement"
    if f["gpu"].startswith(("2x", "8x")) or not f["gpu"]:
        return "other: several GPUs"
    if row.notes.get("stack") not in PLAIN_STACKS:
        return f"other: stack {row.notes.get('stack')}"
    if not f["quant"].startswith(("bf16", "fp16", "bfloat16", "nf4")) or "unsloth" in f["quant"]:
        return f"other: base in {f['quant']}"
    if "Liger" in str(row.notes):
        return "other: fused loss"
    if row.quality not in ("A", "B"):
        return f"other: quality {row.quality}"
    known = f["batch"].isdigit() and f["seq_len"].isdigit() and f["optimizer"]
    return None if known and f["grad_ckpt"].startswith(("yes", "no", "True")) else "other: settings not stated"


def predict(row: Row, shapes: dict[str, Shape]) -> Plan | None:
    """The plan of a row's run; None where its model's architecture is not at hand."""
    shape = find_shape(row.model, shapes)
    f = row.fields
    if shape is None or not f["batch"].strip("(?)").isdigit() or not f["seq_len"].isdigit():
        return None
    plain_loop = row.notes.get("stack") == "hf+peft"  # no Trainer: no autocast, outputs held, no dropout
    spec = JobSpec.model_validate(
        {
            "name": "row",
            "base_model": "a/b",
            "dataset": {"path": "a/b", "max_length": int(f["seq_len"])},
            "lora": {
                "r": int(f["lora_r"] or 8),
                "lora_dropout": 0.0 if plain_loop else 0.05,
                "target_modules": targets(f["target_modules"]),
            },
            "training": {
                "per_device_train_batch_size": int(f["batch"].strip("(?)")),
                "gradient_checkpointing": not f["grad_ckpt"].startswith("no"),
                "exact": True,
                "optim": "adamw_8bit" if "8bit" in f["optimizer"] else "adamw_torch",
            },
            "evaluation": {"samples": 0},
        }
    )
    stack = Stack(
        attention="eager" if row.notes.get("kernel") == "eager" or "no FA" in row.notes else "sdpa",
        autocast=not plain_loop,
        keeps_logits=plain_loop,
        double_quant=row.notes.get("dq") != "False",
    )
    method = Method.QLORA if f["method"].startswith("qlora") else Method.LORA
    return plan(shape, spec, method, stack=stack)


def find_shape(model: str, shapes: dict[str, Shape]) -> Shape | None:
    """By name, the longest that fits: TinyLlama/TinyLlama-1.1B-Chat-v1.0 is tinyllama-1.1b-chat."""
    name = model.lower().rpartition("/")[2].replace("_", ".")
    plain = re.sub(r"[-\s]", " ", name)
    fitting = [key for key in shapes if re.sub(r"[-\s]", " ", key) in plain]
    return shapes[max(fitting, key=len)] if fitting else None


def targets(text: str) -> str | list[str]:
    """Target modules in Llama's terms; all linear layers where the row does not name them."""
    if text.startswith("DEFAULT(attn"):
        return ["q_proj", "k_proj", "v_proj"]
    names = [name.strip() for name in text.split(",")]
    known = {**SHORT_NAMES, **FUSED_NAMES}
    whole = {"gate": ("gate_proj",), "up": ("up_proj",), "down": ("down_proj",)}
    found = [t for name in names for t in known.get(name, whole.get(name, (name,) if name.endswith("_proj") else ()))]
    return found or "all-linear"


def table(rows: Iterable[Row], shapes: dict[str, Shape], metric: str | None) -> list[Score]:
    """Print mean absolute error and share under-predicted by part, source and quality; the rows that were scored."""
    scores = []
    for row in rows:
        made, by = predict(row, shapes), metric or row.metric
        measured = row.measured(by)
        if made is not None and measured:
            scores.append(Score(row=row, predicted=METRICS[by](made), margin=made.margin_bytes, measured=measured))
    print(f"  {'':58} {'rows':>4} {'error':>7} {'bias':>7} {'under':>6} {'worst':>7}")
    parts: list[tuple[str, Callable[[Score], bool]]] = [
        ("all", lambda s: True),
        ("looked at", lambda s: not s.row.held_out),
        ("set aside", lambda s: s.row.held_out),
    ]
    parts += [(f"quality {q}", lambda s, q=q: s.row.quality == q) for q in "ABC"]  # type: ignore[misc]
    names = sorted({s.row.source for s in scores})
    parts += [(name[:56], lambda s, name=name: s.row.source == name) for name in names]  # type: ignore[misc]
    for title, belongs in parts:
        if chosen := [score for score in scores if belongs(score)]:
            errors = [score.error for score in chosen]
            print(
                f"  {title:58} {len(chosen):4} {statistics.mean(map(abs, errors)):7.1%} {statistics.mean(errors):+7.1%}"
                f" {sum(s.under for s in chosen) / len(chosen):6.1%} {min(errors):+7.1%}"
            )
    return scores


def out_of_memory(row: Row, shapes: dict[str, Shape]) -> str:
    """What the plan says of a run that ran out of memory."""
    made = predict(row, shapes) if row.fields["method"] in ("lora", "qlora") else None
    card = CARDS.get(row.fields["gpu"])
    if made is None or card is None:
        return "not planned"
    fits = made.need_bytes <= card
    return f"needs {made.need_bytes / GIB:.2f} of {card / GIB:.1f} GiB: {'CALLED FITTING' if fits else 'refused'}"


def _notes(text: str) -> dict[str, str]:
    """key=value pairs of a row's notes; a word without a value is its own key."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    return {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}


if __name__ == "__main__":
    main()
