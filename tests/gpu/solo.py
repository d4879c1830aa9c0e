"""One training after the other in one process: the engine lean and exact, and transformers' Trainer, on the same rows.

    python -m tests.gpu.solo MODEL ROWS METHOD DEVICE STEPS BATCH LENGTH DROPOUT RECOMPUTES SIDE [SIDE ...]

A side is lean, exact, trainer, or liger: the Trainer with Liger's kernels. Prints a line of JSON a side: seconds and
tokens a step, bytes at its peak, the loss on held-out rows, and which pass it took; and a first line of what the card
reaches in a large product and what the memory plan says. A step that is measured waits for the card, in all alike.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
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
    dropout: float = 0.0
    recomputes: bool = True
    seed: int = 42

    @classmethod
    def of(
        cls,
        model: str,
        rows: str,
        method: str,
        device: str,
        steps: int,
        batch: int,
        length: int,
        dropout: float = 0.0,
        recomputes: bool = True,
    ) -> Course:
        from loractl.common.job.spec import JobSpec
        from loractl.worker.base.model import load_tokenizer
        from loractl.worker.data.prepared import prepare_data

        tokenizer = load_tokenizer(model)
        asked = {"name": "s", "base_model": model, "dataset": {"path": rows, "max_length": length, "test_size": 0.125}}
        data = prepare_data(JobSpec.model_validate(asked).dataset, rows, None, None, tokenizer, None)
        shape = {"steps": steps, "batch": batch, "length": length, "dropout": dropout, "recomputes": recomputes}
        own = {"train": [*data.train.rows], "held_out": [*data.held_out.rows], "pad": tokenizer.pad_token_id}
        return cls(model=model, method=method, device=device, **shape, **own)

    @property
    def lora(self) -> dict[str, Any]:
        return {"r": 16, "lora_alpha": 32, "lora_dropout": self.dropout}

    def spec(self, *, exact: bool = False) -> Any:
        """As a job."""
        from loractl.common.job.spec import JobSpec

        training = {
            "dtype": "bfloat16", "exact": exact, "per_device_train_batch_size": self.batch,
            "gradient_checkpointing": self.recomputes,
        }  # fmt: skip
        asked = {"name": "s", "base_model": self.model, "method": self.method, "lora": self.lora, "training": training}
        return JobSpec.model_validate({**asked, "dataset": {"path": "x.jsonl", "max_length": self.length}})

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

    @property
    def tokens(self) -> int:
        """Real tokens of a step: the mean."""
        rows = [self.train[n % len(self.train)] for n in range(self.steps * self.batch)]
        return sum(len(row.input_ids) for row in rows) // self.steps


def main() -> None:
    model, rows, method, device, steps, batch, length, dropout, recomputes, *sides = sys.argv[1:]
    shape = (int(steps), int(batch), int(length), float(dropout), recomputes == "True")
    course = Course.of(model, rows, method, device, *shape)
    print(json.dumps({"side": "card", **expected(course)}), flush=True)
    for side in sides:
        print(json.dumps({"side": side, **measure(side, course)}), flush=True)


def expected(course: Course) -> dict[str, Any]:
    """Operations a second of a large product in bf16, those that a step can't do without, and the plan's bytes."""
    from loractl.common.job.method import Method
    from loractl.common.memory.config import read_shape
    from loractl.common.memory.plan import plan
    from loractl.common.memory.step import Lengths

    shape = read_shape(course.model, None)
    assert shape is not None, "the family has a plan"
    longest = max(len(row.input_ids) for row in course.train)
    planned = plan(shape, course.spec(), Method(course.method), Lengths(train=longest, evaluate=longest))
    weights = shape.linear_parameters + shape.embedding  # the head reads as many as the embedding has
    # forwards, and the gradient of what it was given: the base's own weights have none
    return {
        "reaches": reached(course.device),
        "needs": 2 * 2.0 * weights * course.tokens,
        "planned": planned.tensor_bytes,
    }


def reached(device: str) -> float:
    """Operations a second."""
    import torch

    size = 8192 if device == "cuda" else 512
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    took = []
    for _ in range(8):
        wait_for(device)
        began = time.perf_counter()
        one @ other
        wait_for(device)
        took.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(took[2:])


def wait_for(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def measure(side: str, course: Course) -> dict[str, Any]:
    """Load, train, and say what it took. Nothing of it is left on the device."""
    import torch

    from . import plain_trainer

    forget(course.device)
    clock = make_clock(course.device)
    took, model = "padded", None
    if side in ("trainer", "liger"):
        model = plain_trainer.train(course, clock, liger=side == "liger")
    else:
        model, took = _by_the_engine(course, clock, exact=side == "exact")
    on_card = course.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_card else 0
    reserved = torch.cuda.max_memory_reserved() if on_card else 0
    loss = plain_trainer.held_out_loss(model, course.held_out, course.device)
    told = {"seconds": clock.median, "tokens": course.tokens, "allocated": peak, "reserved": reserved}
    return {**told, "loss": loss, "pass": took}


def _by_the_engine(course: Course, clock: Any, *, exact: bool) -> tuple[Any, str]:
    with tempfile.TemporaryDirectory() as folder:
        loop, why = loop_of(course, folder, (clock,), exact=exact)
        loop.run()
    return loop.model, type(loop.forward).__name__ + (f" ({why})" if why else "")


def loop_of(course: Course, folder: str, callbacks: tuple[Any, ...], *, exact: bool = False) -> tuple[Any, str | None]:
    """The training's loop; and why its pass is not the lean one."""
    from transformers import set_seed

    from loractl.common.job.method import Method
    from loractl.worker.base.arithmetic import choose_precision, compute_in
    from loractl.worker.base.lora import add_adapter
    from loractl.worker.base.model import Learner, load_base, load_tokenizer
    from loractl.worker.engine.loop import TrainingLoop, TrainingRows
    from loractl.worker.engine.passes.choice import forward_pass

    spec = course.spec(exact=exact)
    method, precision = Method(course.method), choose_precision(course.device, "bfloat16")
    base = load_base(course.model, method, course.device, precision)
    set_seed(course.seed)
    adapted = add_adapter(base, spec, method)
    compute_in(adapted, precision)
    learner = Learner(model=adapted, tokenizer=load_tokenizer(course.model), precision=precision)
    forward, why = forward_pass(learner, spec, course.length)
    arguments = course.arguments(folder, activation_checkpointing=course.recomputes)
    rows = TrainingRows(train=course.train, held_out=[])
    return TrainingLoop(forward, arguments, rows, callbacks), why


def forget(device: str) -> None:
    """Give back what is no longer used, and let peaks begin anew."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_clock(device: str) -> Any:
    """A callback that notes when each step ends."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        @property
        def median(self) -> float:
            ends = self.ends[min(UNMEASURED, len(self.ends) - 2) :]
            return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait_for(device)
            self.ends.append(time.perf_counter())

    return StepClock()


if __name__ == "__main__":
    main()
