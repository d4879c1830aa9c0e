"""One job on several processes beside one: python -m benchmarks.gang [MODEL] [--steps 20] [--rows 23] [--cards 2].

Each line is a training of its own, with windows of two micro-batches and a last batch that does not divide evenly. It
says how far losses and adapter are from one process's, how long the steps took, and what the fullest card held. With
`--cards` it runs on so many of this box's NVIDIA cards, else on two processes that share the processor's cores, where
nothing is won. Without MODEL a random one of two blocks is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from loractl.common.job.method import Method, Parallel
from loractl.common.job.spec import JobSpec
from loractl.worker.base.adapter import WEIGHTS
from loractl.worker.protocol.messages import Ended, Rank, Start, Stepped, decode_told, encode

PROCESSOR = [Rank(rank=rank, node=f"box:{rank}", gpu="cpu", device="cpu") for rank in range(2)]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("LoRA, fp32", "lora", {"dtype": "float32"}),
    ("LoRA, fp32, exact", "lora", {"dtype": "float32", "exact": True}),
    ("NF4, fp32", "qlora", {"dtype": "float32"}),
    ("NF4, bf16", "qlora", {"dtype": "bfloat16"}),
    ("NF4, bf16, checkpointing", "qlora", {"dtype": "bfloat16", "gradient_checkpointing": True}),
]


@dataclass(frozen=True, kw_only=True)
class Trained:
    losses: list[float]
    held_out: list[float]
    adapter: dict[str, torch.Tensor]
    seconds: float  # from the order to its end
    tokens_per_second: float
    peak: int  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=23)
    parser.add_argument("--cards", type=int)
    given = parser.parse_args()
    ranks = PROCESSOR if given.cards is None else _cards(given.cards)
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or _tiny(Path(folder) / "model")
        data = _rows(Path(folder) / "rows.jsonl", given.rows)
        print(f"{given.steps} steps of {model.name} on {len(ranks)} ranks; the largest differences to one process\n")
        print(f"{'':<26}{'':<10}{'loss':>10}{'held out':>10}{'adapter':>10}{'tok/s':>8}{'seconds':>9}{'MiB':>8}")
        for title, method, training in CASES:
            training = {"max_steps": given.steps, "eval_steps": 5, **training}
            one = None
            for kind in Parallel:
                order = _order(Path(folder) / f"{title} {kind}", model, data, method, training, kind, ranks)
                found = _train(order, ranks[0])
                one = one or found
                print(f"{title:<26}{kind.value:<10}{_beside(one, found)}", flush=True)


def _beside(one: Trained, other: Trained) -> str:
    loss = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    held_out = max(abs(a - b) for a, b in zip(one.held_out, other.held_out, strict=True))
    adapter = max(float((one.adapter[name] - other.adapter[name]).abs().max()) for name in one.adapter)
    apart = f"{loss:>10.1e}{held_out:>10.1e}{adapter:>10.1e}"
    return f"{apart}{other.tokens_per_second:>8.0f}{other.seconds:>9.1f}{other.peak / 2**20:>8.0f}"


def _cards(count: int) -> list[Rank]:
    from loractl.common.settings import load_settings
    from loractl.worker.device.devices import find_devices

    cards = find_devices(load_settings({"LORACTL_DEVICES": "nvml"}))
    assert len(cards) >= count, f"this box has {len(cards)} cards"
    return [
        Rank(rank=n, node=f"box:{n}", gpu=card.uuid, device="cuda", environment=card.environment())
        for n, card in enumerate(cards[:count])
    ]


def _train(order: Start, own: Rank) -> Trained:
    """Train as a worker does: in a process of its own, which starts the others."""
    began, losses, held_out, speed, peak = time.monotonic(), [], [], 0.0, 0
    process = subprocess.Popen(
        [sys.executable, "-m", "loractl.worker.recipe.trainer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", **own.environment},
    )
    assert process.stdin and process.stdout
    process.stdin.write(encode(order))
    process.stdin.flush()
    for line in process.stdout:
        message = decode_told(line)
        if isinstance(message, Stepped):
            losses += [value for name, value in message.metrics.items() if name == "loss"]
            held_out += [value for name, value in message.metrics.items() if name == "eval_loss"]
            speed = message.tokens_per_second or speed
        if isinstance(message, Ended):
            assert message.reason.value == "ok", message
            peak = (message.peaks.reserved if message.peaks else None) or 0
            break
    process.stdin.close()
    process.wait()
    return Trained(
        losses=losses,
        held_out=held_out,
        adapter=load_file(Path(order.output_dir) / "adapter" / WEIGHTS),
        seconds=time.monotonic() - began,
        tokens_per_second=speed,
        peak=peak,
    )


def _order(
    folder: Path, model: Path, data: Path, method: str, training: dict[str, Any], kind: Parallel, ranks: list[Rank]
) -> Start:
    spec = JobSpec.model_validate(
        {
            "name": "gang",
            "base_model": str(model),
            "method": method,
            "dataset": {"path": str(data), "max_length": 256, "test_size": 0.1},
            "lora": {"r": 8, "lora_dropout": 0.0},
            "training": {
                "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "logging_steps": 1,
                "save_steps": 1000, "learning_rate": 1e-3, **training,
            },
            "evaluation": {"samples": 0},
        }
    )  # fmt: skip
    (folder / "result").mkdir(parents=True)
    gang = {} if kind is Parallel.NONE else {"parallel": kind, "ranks": ranks}
    return Start(
        job_id=1, attempt=1, user="b", node="box:0", gpu=ranks[0].gpu, device=ranks[0].device, spec=spec,
        method=Method(method), vram_planned=None,
        data_path=str(data), data_sha256=None, eval_path=None, output_dir=str(folder / "result"),
        checkpoint_dir=str(folder / "checkpoints"), earlier_checkpoints=[], cache_dir=str(folder.parent / "cache"),
        **gang,
    )  # fmt: skip


def _rows(path: Path, count: int) -> Path:
    lines = [
        {"messages": [
            {"role": "user", "content": f"ticket {n}: {'please ' * (n % 7)}look at the queue"},
            {"role": "assistant", "content": f"queue: {('storage', 'network', 'gpu')[n % 3]}"},
        ]}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _tiny(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.models import make_tiny_model

    return make_tiny_model(folder)


if __name__ == "__main__":
    main()
