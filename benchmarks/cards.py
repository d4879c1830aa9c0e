"""The memory plan on several cards: python -m benchmarks.cards [PATH/measured.csv].

First README.md's table: the largest common model that each size of card holds. Then what 8B, 32B and 70B models need of
each card, LoRA and QLoRA, on 1, 2 and 4 of them, and whether cards of 24 and 80 GiB hold that. Last the plan beside
published runs on several cards, where the file with them is given: those of plain loops are planned as the exact mode,
since they keep the logits of all tokens.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path
from typing import Any

from loractl.common.job.method import Method, Parallel
from loractl.common.job.spec import JobSpec
from loractl.common.memory.families import shape_of
from loractl.common.memory.plan import plan
from loractl.common.memory.shape import Shape
from loractl.common.memory.step import Stack
from loractl.common.placement.cards import MARGIN_BYTES
from loractl.common.units import GIB

from .memory_plan import SIZES

MODELS = {
    "8B": ("llama", (4096, 32, 32, 8, 14336, 128256)),
    "32B": ("qwen2", (5120, 64, 40, 8, 27648, 152064)),
    "70B": ("llama", (8192, 80, 64, 8, 28672, 128256)),
}
"""Sizes in the config.json of Llama 3.1 8B, Qwen2.5 32B and Llama 3.1 70B."""

COMMON = {
    "Llama 3.2 1B": ("llama", (2048, 16, 32, 8, 8192, 128256), True),
    "Llama 3.2 3B": ("llama", (3072, 28, 24, 8, 8192, 128256), True),
    "Llama 3.1 8B": (*MODELS["8B"], False),
    "Qwen2.5 14B": ("qwen2", (5120, 48, 40, 8, 13824, 152064), False),
    "Qwen2.5 32B": (*MODELS["32B"], False),
    "Llama 3.1 70B": (*MODELS["70B"], False),
}
"""README.md's models, by size: the shape in each one's config.json, and whether embedding and head are one."""

COMMON_CARDS = (8, 12, 16, 24, 48, 80)
"""GiB."""

PUBLISHED = {
    "Llama 2 7B": ("llama", (4096, 32, 32, 32, 11008, 32000)),
    "Llama 70B": ("llama", (8192, 80, 64, 8, 28672, 32000)),
}
"""The models of the published rows, both of Llama 2."""

METHODS = (Method.LORA, Method.QLORA)
CARDS = (24, 80)
DIVIDED = [Stack(), Stack(cards=2, parallel=Parallel.DATA)] + [
    Stack(cards=cards, parallel=Parallel.SHARDED) for cards in (2, 4)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="?", type=Path)
    given = parser.parse_args()
    print("\n".join(fits()), end="\n\n")
    print("GiB a card by the plan, rank 16, 4 rows of 1,024 tokens at once, 16 a step; fits: cards of 24 and 80 GiB\n")
    print(f"{'':<12}" + "".join(f"{_name(stack):>22}" for stack in DIVIDED))
    for model, (family, sizes) in MODELS.items():
        for method in METHODS:
            cells = [_cell(_shape(family, sizes), method, stack) for stack in DIVIDED]
            print(f"{model + ' ' + method.value:<12}" + "".join(f"{cell:>22}" for cell in cells))
    if given.measured is not None:
        _beside_published(given.measured)


def fits() -> list[str]:
    """README.md's rows: the largest model that a card holds by the plan, with what it needs."""
    rows = []
    for card in COMMON_CARDS:
        cells = [f"{card} GiB"]
        for method in METHODS:
            needs = {
                model: plan(_shape(family, sizes, tied), _job(1024, 4, 16), method).need_bytes
                for model, (family, sizes, tied) in COMMON.items()
            }
            largest = [model for model, need in needs.items() if need <= card * GIB - MARGIN_BYTES][-1]
            cells.append(f"{largest}: {needs[largest] / GIB:.1f} GiB")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _name(stack: Stack) -> str:
    return "1 card" if stack.cards == 1 else f"{stack.cards} cards, {stack.parallel.value}"


def _cell(shape: Shape, method: Method, stack: Stack) -> str:
    need = plan(shape, _job(1024, 4, 16), method, stack=stack).need_bytes
    fits = [str(size) for size in CARDS if need <= size * GIB - MARGIN_BYTES]
    return f"{need / GIB:.1f} ({'+'.join(fits) or 'neither'})"


def _beside_published(path: Path) -> None:
    print(f"\n{'published on several cards':<44}{'measured':>9}{'plan':>8}{'exact':>8}   GiB a card")
    for row in csv.DictReader(path.open()):
        cards = re.match(r"(\d+)x", row["gpu"])
        method = Method.QLORA if row["method"].startswith("qlora") else Method.LORA
        if cards is None or int(cards[1]) < 2 or row["model"] not in PUBLISHED or not row["lora_r"]:
            continue
        shape = _shape(*PUBLISHED[row["model"]])
        how = Parallel.DATA if "DDP" in row["notes"] else Parallel.SHARDED
        stack, batch = Stack(cards=int(cards[1]), parallel=how), int(row["batch"])
        spec = {exact: _job(int(row["seq_len"]), batch, int(row["lora_r"]), stack.cards, exact) for exact in (0, 1)}
        needs = [plan(shape, spec[exact], method, stack=stack) for exact in (0, 1)]
        published, plans = _published(row), [need.peak_bytes - need.parts["context"] for need in needs]
        title = f"{row['model']} {row['method'][:22]}, {cards[0]} {how.value}, {batch} x {row['seq_len']}"
        print(f"{title:<44.44}{published / GIB:>9.1f}" + "".join(f"{size / GIB:>8.1f}" for size in plans))


def _published(row: dict[str, str]) -> float:
    """Bytes a card. Of a run with its weights in the host's memory the source also has the figure without that."""
    without = re.search(r"no offload = ([\d.]+) GB", row["notes"])
    return float(without[1] if without else row["peak_gb"]) * 1e9


def _shape(family: str, sizes: tuple[int, ...], tied: bool = False) -> Shape:
    named = dict(zip(SIZES, sizes, strict=True))
    shape = shape_of({"model_type": family, "tie_word_embeddings": tied, **named})
    assert shape is not None
    return shape


def _job(length: int, batch: int, r: int, cards: int = 4, exact: int = 0) -> JobSpec:
    training: dict[str, Any] = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": cards}
    return JobSpec.model_validate(
        {
            "name": "t",
            "base_model": "org/model",
            "dataset": {"path": "org/data", "max_length": length},
            "lora": {"r": r, "lora_dropout": 0},
            "training": {**training, "exact": bool(exact)},
            "evaluation": {"samples": 0},
        }
    )


if __name__ == "__main__":
    main()
