"""A training step by the engine beside the tutorial recipe's: python -m benchmarks.engine MODEL ROWS [bf16|nf4 BATCH].

The tutorial recipe is transformers' Trainer on peft's model, for NF4 after prepare_model_for_kbit_training. Both learn
the same rows in the same order from the same adapter, in one process and in turn, step by step, on one thread. Told are
real tokens a CPU second (the median step), the loss on held-out rows after the last step, and the largest resident set,
for which each side runs once more alone. `limit` is what the base's matrix products alone take: forward, and the
gradients of their inputs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import choose_precision, compute_in, keep_nf4_in_training_mode
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.data.batch import collate, inputs_of
from loractl.worker.data.prepared import prepare_data
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.lean import LeanPass
from loractl.worker.engine.loop import run
from loractl.worker.engine.loss import learned_in
from loractl.worker.engine.member import MemberRows, PackMember

STEPS = 6
"""The first one is not measured: it compiles kernels."""

HELD_OUT = 16
SETTINGS = (("bf16", 2), ("bf16", 8), ("nf4", 8))
SIDES = ("tutorial", "loractl")


def main() -> None:
    model, rows, *setting = sys.argv[1:]
    model, rows = str(Path(model).resolve()), str(Path(rows).resolve())
    if setting:
        print(json.dumps(measure(model, rows, setting[0], int(setting[1]), setting[2:] or SIDES)))
        return
    print("                 tokens a CPU second           held-out loss       peak RSS, MiB          of the")
    print("                 tutorial loractl  ratio   tutorial  loractl   tutorial loractl ratio   limit")
    for base, batch in SETTINGS:
        both = child(model, rows, base, batch)
        peaks = [child(model, rows, base, batch, side)["peak"] for side in SIDES]
        (slow, fast), (theirs, ours) = (both[key] for key in ("speed", "loss"))
        print(
            f"{base}, {batch} rows{slow:17.0f}{fast:8.0f}{fast / slow:6.2f}x{theirs:11.4f}{ours:9.4f}"
            f"{peaks[0]:11.0f}{peaks[1]:8.0f}{peaks[1] / peaks[0]:6.2f}{fast / both['limit']:8.2f}",
            flush=True,
        )


def child(*arguments: object) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.engine", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Turns:
    """Lets two threads take steps in turn, and measures the CPU time of each."""

    sides: tuple[str, ...]
    costs: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = {side: threading.Semaphore(int(side == self.sides[0])) for side in self.sides}

    def callback(self, side: str) -> TrainerCallback:
        turns, costs = self, self.costs.setdefault(side, [])

        class Turn(TrainerCallback):
            _began = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turns._free[side].acquire()
                self._began = time.thread_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                costs.append(time.thread_time() - self._began)
                turns._free[turns.sides[(turns.sides.index(side) + 1) % len(turns.sides)]].release()

        return Turn()


def measure(model: str, rows: str, base: str, batch: int, sides: tuple[str, ...] | list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    train, held_out, pad = data_of(model, rows)
    turns = Turns(sides=tuple(sides))
    kinds = {"tutorial": by_tutorial, "loractl": by_loractl}
    # The tutorial's side last: making further TrainingArguments takes away the state that its Trainer holds on to.
    made = {s: kinds[s](model, base, batch, train, held_out, pad, turns.callback(s)) for s in sorted(sides)}
    ready = [made[side] for side in sides]

    threads = [threading.Thread(target=or_end, args=(train_one,)) for train_one, _ in ready]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses = [loss() for _, loss in ready]
    # a sequential order: the rows of step n are the same on both sides
    tokens = [sum(len(row.input_ids) for row in train[n * batch : (n + 1) * batch]) for n in range(STEPS)]
    speed = {s: statistics.median(t / c for t, c in zip(tokens[1:], turns.costs[s][1:], strict=True)) for s in sides}
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    told = {"speed": [speed[side] for side in sides], "loss": losses, "peak": peak}
    return told | ({"limit": limit(model, train[: STEPS * batch])} if len(sides) > 1 else {})


def or_end(train: Callable[[], Any]) -> None:
    """Train; a side that fails ends the process, since the other one would wait for its turn."""
    try:
        train()
    except BaseException:  # noqa: BLE001  whatever it is, the other side must not wait for ever
        traceback.print_exc()
        os._exit(1)


def data_of(model: str, rows: str) -> tuple[list[TokenRow], list[TokenRow], int]:
    spec = spec_of(model, "bf16", rows)
    tokenizer = load_tokenizer(model)
    data = prepare_data(spec.dataset, rows, None, None, tokenizer, None)
    return data.train.rows, data.held_out.rows[:HELD_OUT], tokenizer.pad_token_id


def spec_of(model: str, base: str, rows: str = "x.jsonl") -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "benchmark", "base_model": model, "method": "qlora" if base == "nf4" else "lora",
            "dataset": {"path": rows, "max_length": 256}, "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
            "training": {"dtype": "bfloat16"},
        }
    )  # fmt: skip


def arguments(folder: str, batch: int, optim: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=1e-3, bf16=True,
        use_cpu=True, save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True, optim=optim,
        train_sampling_strategy="sequential", remove_unused_columns=False, data_seed=0, seed=0, label_names=["labels"],
    )  # fmt: skip


def by_tutorial(
    model: str, base: str, batch: int, train: list[TokenRow], held_out: list[TokenRow], pad: int, turn: TrainerCallback
) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    method = Method.QLORA if base == "nf4" else Method.LORA
    loaded = load_base(model, method, "cpu", choose_precision("cpu", "bfloat16"))
    if base == "nf4":
        loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
        keep_nf4_in_training_mode(loaded)  # else its own evaluation would ruin it
    set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(loaded, lora),
        args=arguments(tempfile.mkdtemp(), batch, "adamw_torch"),
        train_dataset=[inputs_of(row) for row in train],
        eval_dataset=[inputs_of(row) for row in held_out],
        data_collator=lambda rows: collate(rows, pad),
        callbacks=[turn],
    )

    def loss() -> float:
        trainer.model.eval()
        with torch.no_grad():
            losses = [float(trainer.model(**collate([inputs_of(row)], pad)).loss) for row in held_out]
        return weighted(losses, held_out)

    return trainer.train, loss


def by_loractl(
    model: str, base: str, batch: int, train: list[TokenRow], held_out: list[TokenRow], pad: int, turn: TrainerCallback
) -> Any:
    spec, precision = spec_of(model, base), choose_precision("cpu", "bfloat16")
    loaded = load_base(model, Method(spec.method), "cpu", precision)
    set_seed(0)
    adapted = add_adapter(loaded, spec, Method(spec.method))
    compute_in(adapted, precision)
    forward = LeanPass(adapted, precision)
    given = arguments(tempfile.mkdtemp(), batch, "adamw_torch_fused")
    member = PackMember(forward, given, MemberRows(train=train, held_out=held_out), (turn,))

    def loss() -> float:
        adapted.eval()
        return weighted([forward.held_out_loss([row]) for row in held_out], held_out)

    return lambda: run([member]), loss


def weighted(losses: list[float], rows: list[TokenRow]) -> float:
    """The mean over learned tokens."""
    counts = [learned_in([row]) for row in rows]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def limit(model: str, rows: list[TokenRow]) -> float:
    """Tokens a CPU second of the base's matrix products alone, in bf16, with the head on learned tokens."""
    base = load_base(model, Method.LORA, "cpu", choose_precision("cpu", "bfloat16"))
    tokens = 512
    share = learned_in(rows) / sum(len(row.input_ids) for row in rows)
    inner = [m.weight for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]

    def seconds(weight: torch.Tensor, count: int) -> float:
        x = torch.randn(count, weight.shape[1], dtype=torch.bfloat16)
        g = torch.randn(count, weight.shape[0], dtype=torch.bfloat16)
        began = time.process_time()
        torch.nn.functional.linear(x, weight)
        torch.matmul(g, weight)
        return time.process_time() - began

    def once() -> float:
        return sum(seconds(w, tokens) for w in inner) + seconds(base.lm_head.weight, int(tokens * share))

    return tokens / statistics.median(once() for _ in range(4))


if __name__ == "__main__":
    main()
