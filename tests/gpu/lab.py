"""One base in this process, and trainings on it that learn rows of a given number of tokens."""

from __future__ import annotations

import functools
import gc
import itertools
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from .steps import Steps

STEPS = 6
"""The first one is not measured: it compiles kernels."""


class Lab:
    """One base, and members on it that learn rows of a given number of tokens."""

    def __init__(
        self,
        model: str,
        rows: str,
        kind: str,
        *,
        recompute: bool = False,
        device: str = "cpu",
        longest: int = 256,
        apart: bool = False,
    ) -> None:
        """`kind`: fp32, bf16 or nf4. `longest`: tokens of a row of the file; members' rows are cut from all of them
        behind each other. `apart`: each member's rows are multiplied by themselves, whatever the machine answers."""
        from loractl.common.job.method import Method
        from loractl.common.job.spec import JobSpec
        from loractl.worker.base.arithmetic import choose_precision
        from loractl.worker.base.model import load_base, load_tokenizer
        from loractl.worker.data.prepared import prepare_data
        from loractl.worker.engine.passes.choice import shared_base

        dtype = "float32" if kind == "fp32" else "bfloat16"
        asked = {
            "name": "b", "base_model": model, "method": "qlora" if kind == "nf4" else "lora",
            "dataset": {"path": rows, "max_length": longest}, "training": {"dtype": dtype},
            "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        }  # fmt: skip
        self._spec, self._method = JobSpec.model_validate(asked), Method(asked["method"])
        data = prepare_data(self._spec.dataset, rows, None, None, load_tokenizer(model), None)
        self._tokens = [pair for row in data.train.rows for pair in zip(row.input_ids, row.labels, strict=True)]
        self._device, self._recompute = device, recompute
        self._precision = choose_precision("cuda" if device == "cuda" else "cpu", dtype)
        base = shared_base(load_base(model, self._method, device, self._precision), self._precision)
        assert base is not None
        self.base = base
        self._once = _each_by_itself if apart else None

    def side(self, shapes: list[str], *, one_pack: bool) -> Side:
        import torch

        make = [functools.partial(self.loop, number, shape) for number, shape in enumerate(shapes)]
        return Side(steps=Steps(torch.device(self._device), make, together=one_pack))

    def loop(self, number: int, shape: str, session: Any) -> Any:
        """A training of the engine; the same one whenever it is made."""
        return session.run(functools.partial(self._loop, number, shape, session))

    def _loop(self, number: int, shape: str, session: Any) -> Any:
        from transformers import TrainingArguments, set_seed

        from loractl.worker.base.arithmetic import compute_in
        from loractl.worker.base.lora import add_adapter
        from loractl.worker.data.tokens import TokenRow
        from loractl.worker.engine.loop import MemberRows, TrainingLoop
        from loractl.worker.engine.passes.shared import SharedPass

        count, _, length = shape.rpartition("x")
        batch, size = int(count or 1), int(length)
        begin = number * 5000 % len(self._tokens)
        pairs = itertools.cycle(self._tokens[begin:] + self._tokens[:begin])
        rows = []
        for n in range(batch * (STEPS + 2)):
            ids, labels = zip(*itertools.islice(pairs, size), strict=True)
            rows.append(TokenRow(number=n, input_ids=[*ids], labels=[*labels]))
        set_seed(number)
        model = add_adapter(self.base.view(), self._spec, self._method)
        compute_in(model, self._precision)
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=STEPS + 2, per_device_train_batch_size=batch,
            bf16=self._spec.training.dtype == "bfloat16",
            use_cpu=self._device == "cpu", save_strategy="no", report_to=[], optim="adamw_torch_fused",
            learning_rate=1e-3,
            train_sampling_strategy="sequential", activation_checkpointing=self._recompute, disable_tqdm=True,
        )  # fmt: skip
        forward = SharedPass(self.base, model, streams=session.streams, once=self._once)
        return TrainingLoop(session, forward, arguments, MemberRows(train=rows, held_out=rows[-batch:]))


def _each_by_itself(question: str, find_out: Any, /, *, keeps: Any) -> Any:
    """In the place of what the machine answers about rows of several members in one product."""
    from loractl.worker.base.kept.knowledge import Known

    return Known("a benchmark asks for it", 0)


@dataclass
class Side:
    """Trainings, and what their steps took."""

    steps: Steps
    costs: list[float] = field(default_factory=list)

    def step(self) -> None:
        gc.collect()
        began = time.process_time()
        self.steps.step()
        self.costs.append(time.process_time() - began)
