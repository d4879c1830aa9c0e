"""One training after the other in one process: the engine lean and exact, and transformers' Trainer, on the same rows.

    python -m tests.gpu.solo MODEL ROWS METHOD DEVICE STEPS BATCH LENGTH

Prints a line of JSON a side: seconds a step, bytes at its peak, the loss on held-out rows, and which pass it took. A
step that is measured waits for the card, in all three alike.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from loractl.worker.data.tokens import TokenRow

SIDES = ("lean", "exact", "trainer")

UNMEASURED = 2
"""Steps at the beginning that compile kernels and fill memory for the first time."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all sides do."""

    model: str
    method: str
    device: str
    steps: int
    batch: int
    length: int
    train: list[TokenRow]
    held_out: list[TokenRow]
    pad: int
    seed: int = 42
    lora: dict[str, Any] = field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0})

    @classmethod
    def of(cls, model: str, rows: str, method: str, device: str, steps: int, batch: int, length: int) -> Course:
        from loractl.common.job.spec import JobSpec
        from loractl.worker.base.model import load_tokenizer
        from loractl.worker.data.prepared import prepare_data

        tokenizer = load_tokenizer(model)
        asked = {"name": "s", "base_model": model, "dataset": {"path": rows, "max_length": length, "test_size": 0.125}}
        data = prepare_data(JobSpec.model_validate(asked).dataset, rows, None, None, tokenizer, None)
        shape = {"steps": steps, "batch": batch, "length": length}
        own = {"train": [*data.train.rows], "held_out": [*data.held_out.rows], "pad": tokenizer.pad_token_id}
        return cls(model=model, method=method, device=device, **shape, **own)

    def arguments(self, folder: str, **more: Any) -> Any:
        """transformers' arguments, the same for all."""
        from transformers import TrainingArguments

        # torch's plain AdamW on a processor: paged state is for cards
        optimizer = "paged_adamw_8bit" if (self.method, self.device) == ("qlora", "cuda") else "adamw_torch_fused"
        return TrainingArguments(
            output_dir=folder, max_steps=self.steps, per_device_train_batch_size=self.batch, bf16=True,
            use_cpu=self.device == "cpu", save_strategy="no", report_to=[], disable_tqdm=True, optim=optimizer,
            learning_rate=2e-4, train_sampling_strategy="sequential", seed=self.seed, data_seed=self.seed, **more,
        )  # fmt: skip


def main() -> None:
    model, rows, method, device, *numbers = sys.argv[1:]
    course = Course.of(model, rows, method, device, *map(int, numbers))
    for side in SIDES:
        print(json.dumps({"side": side, **measure(side, course)}), flush=True)


def measure(side: str, course: Course) -> dict[str, Any]:
    """Load, train, and say what it took. Nothing of it is left on the device."""
    import torch

    from . import plain_trainer

    forget(course.device)
    clock = make_clock(course.device)
    took, model = "padded", None
    if side == "trainer":
        model = plain_trainer.train(course, clock)
    else:
        model, took = _by_the_engine(course, clock, exact=side == "exact")
    on_card = course.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_card else 0
    reserved = torch.cuda.max_memory_reserved() if on_card else 0
    loss = plain_trainer.held_out_loss(model, course.held_out, course.device)
    return {"seconds": clock.median, "allocated": peak, "reserved": reserved, "loss": loss, "pass": took}


def _by_the_engine(course: Course, clock: Any, *, exact: bool) -> tuple[Any, str]:
    from transformers import set_seed

    from loractl.common.job.method import Method
    from loractl.common.job.spec import JobSpec
    from loractl.worker.base.arithmetic import choose_precision, compute_in
    from loractl.worker.base.learner import Learner
    from loractl.worker.base.lora import add_adapter
    from loractl.worker.base.model import load_base, load_tokenizer
    from loractl.worker.engine.loop import run
    from loractl.worker.engine.member import MemberRows, PackMember
    from loractl.worker.engine.passes.choice import forward_pass, shared_base

    training = {"dtype": "bfloat16", "exact": exact}
    asked = {"name": "s", "base_model": course.model, "method": course.method, "lora": course.lora}
    spec = JobSpec.model_validate({**asked, "dataset": {"path": "x.jsonl"}, "training": training})
    method, precision = Method(course.method), choose_precision(course.device, "bfloat16")
    base = load_base(course.model, method, course.device, precision)
    shared = None if exact else shared_base(base, precision)
    set_seed(course.seed)
    adapted = add_adapter(base if shared is None else shared.view(), spec, method)
    compute_in(adapted, precision)
    learner = Learner(model=adapted, tokenizer=load_tokenizer(course.model), precision=precision)
    forward, why = forward_pass(learner, spec, course.length, shared)
    with tempfile.TemporaryDirectory() as folder:
        arguments = course.arguments(folder, activation_checkpointing=True)
        run([PackMember(forward, arguments, MemberRows(train=course.train, held_out=[]), (clock,))])
    return adapted, type(forward).__name__ + (f" ({why})" if why else "")


def forget(device: str) -> None:
    """Give back what is no longer used, and let peaks begin anew."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_clock(device: str) -> Any:
    """A callback that notes when each step ends."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        @property
        def median(self) -> float:
            ends = self.ends[min(UNMEASURED, len(self.ends) - 2) :]
            return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    return StepClock()


if __name__ == "__main__":
    main()
