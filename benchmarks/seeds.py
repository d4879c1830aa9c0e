"""Held-out losses of lean trainings beside those of transformers' Trainer: python -m benchmarks.seeds MODEL ROWS [OUT]

For each seed all train the same job: the engine in bf16 as a job runs by default, transformers' Trainer on peft's model
in bf16, and the Trainer in fp32, which shows what rounding alone does. Told are the held-out losses after STEPS steps,
seed by seed, their means, and the interval of the Trainer's own seeds in bf16 (Student's, 95%): the engine's mean must
lie within. Each adapter is scored on the base in fp32. Each training is a process; with OUT, what was measured is kept
in that file, and a second call goes on where the first was cut. All take about an hour on one thread; SEEDS=0,1 STEPS=5
make it short, BATCH=4 LENGTH=256 four times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2,3,4").split(",")]
STEPS = int(os.environ.get("STEPS", "100"))
BATCH, HELD_OUT = int(os.environ.get("BATCH", "2")), 64
LENGTH = int(os.environ.get("LENGTH", "128"))
"""Tokens of a row at most."""
SIDES = ("lean", "trainer", "fp32")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5% quantile of Student's t, by the number of seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("rows", metavar="ROWS")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "SEED"), help="train this one, and print its loss")
    given = parser.parse_args()
    model, rows, kept = given.model, given.rows, given.out
    if given.one:
        side, seed = given.one
        print(_train(model, rows, side, int(seed)))
        return
    found: dict[str, float] = json.loads(kept.read_text("utf-8")) if kept is not None and kept.exists() else {}
    for side in reversed(SIDES):
        for seed in SEEDS:
            key = _key(side, seed)
            if key not in found:
                found[key] = _child(model, rows, side, seed)
            if kept is not None:
                kept.write_text(json.dumps(found), "utf-8")
    for seed in SEEDS:
        lean, trainer, exact = (found[_key(side, seed)] for side in SIDES)
        print(f"seed {seed}: lean {lean:.4f}, Trainer {trainer:.4f}, in fp32 {exact:.4f}", flush=True)
    _tell({side: [found[_key(side, seed)] for seed in SEEDS] for side in SIDES})


def _key(side: str, seed: int) -> str:
    return f"{side} {seed} {STEPS} {BATCH}x{LENGTH}"


def _tell(losses: dict[str, list[float]]) -> None:
    lean, trainer, exact = (statistics.fmean(losses[side]) for side in SIDES)
    width = statistics.stdev(losses["trainer"]) / len(SEEDS) ** 0.5 * STUDENT[len(SEEDS)]
    inside = abs(lean - trainer) <= width
    verdict = "within" if inside else "OUTSIDE"
    print(f"mean: lean {lean:.4f}, Trainer {trainer:.4f} ± {width:.4f}: {verdict}; in fp32 {exact:.4f}")


def _child(model: str, rows: str, side: str, seed: int) -> float:
    command = [sys.executable, "-m", "benchmarks.seeds", model, rows, "--one", side, str(seed)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def _train(model: str, rows: str, side: str, seed: int) -> float:
    import torch
    from transformers import Trainer, TrainingArguments, set_seed

    from loractl.common.job.method import Method
    from loractl.common.job.spec import JobSpec
    from loractl.worker.base.arithmetic import choose_precision, compute_in
    from loractl.worker.base.lora import add_adapter
    from loractl.worker.base.model import load_base, load_tokenizer
    from loractl.worker.data.prepared import prepare_data
    from loractl.worker.data.token_rows import collate, inputs_of
    from loractl.worker.engine.loop import TrainingLoop, TrainingRows
    from loractl.worker.engine.passes.lean import LeanPass

    torch.set_num_threads(1)
    asked = {
        "name": "b", "base_model": model, "method": "lora",
        "dataset": {"path": rows, "max_length": LENGTH, "on_overflow": "drop"},
        "training": {"dtype": "float32" if side == "fp32" else "bfloat16", "seed": seed},
    }  # fmt: skip
    spec = JobSpec.model_validate(asked)
    precision = choose_precision("cpu", spec.training.dtype)
    tokenizer = load_tokenizer(model)
    data = prepare_data(spec.dataset, rows, None, None, tokenizer, None)
    train, held_out, pad = data.train.rows, data.held_out.rows[:HELD_OUT], tokenizer.pad_token_id
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True,
        learning_rate=spec.training.learning_rate, save_strategy="no", report_to=[], seed=seed, data_seed=seed,
        lr_scheduler_type=spec.training.lr_scheduler_type, remove_unused_columns=False, disable_tqdm=True,
        optim="adamw_torch_fused" if side == "lean" else "adamw_torch", label_names=["labels"], bf16=side != "fp32",
    )  # fmt: skip
    loaded = load_base(model, Method.LORA, "cpu", precision)
    set_seed(seed)
    adapted = add_adapter(loaded, spec, Method.LORA)
    if side == "lean":
        compute_in(adapted, precision)
        rows_of = TrainingRows(train=train, held_out=[])
        TrainingLoop(LeanPass(adapted, precision), arguments, rows_of).run()
    else:
        inputs: list[Any] = [inputs_of(row) for row in train]
        Trainer(
            model=adapted, args=arguments, train_dataset=inputs, data_collator=lambda some: collate(some, pad)
        ).train()
    return _scored(model, spec, adapted, tokenizer, held_out)


def _scored(model: str, spec: Any, trained: Any, tokenizer: Any, rows: Any) -> float:
    """The held-out loss of a trained adapter on its base in fp32: one instrument for both sides."""
    import torch

    from loractl.common.job.method import Method
    from loractl.worker.base.arithmetic import choose_precision
    from loractl.worker.base.lora import add_adapter
    from loractl.worker.base.model import load_base
    from loractl.worker.evaluation.row_losses import score_rows

    whole = add_adapter(load_base(model, Method.LORA, "cpu", choose_precision("cpu", "float32")), spec, Method.LORA)
    found = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if weight.requires_grad:
                weight.copy_(found.pop(name))
    assert not found
    with torch.no_grad():
        scores = score_rows(whole.eval(), tokenizer, rows, 4)
    return float(scores.loss.sum() / scores.tokens.sum())


if __name__ == "__main__":
    main()
