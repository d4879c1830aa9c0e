"""One side of a comparison, in a process of its own: it takes a step when it is told to, and tells what it cost.

Nothing of loractl is imported here: other tools run in environments of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

IGNORED = -100


class Gate(TrainerCallback):
    """Waits for a line before each step; tells the process's CPU seconds and the real tokens of it afterwards."""

    def __init__(self, folder: str) -> None:
        self.job: dict[str, Any] = json.loads((Path(folder) / "job.json").read_text("utf-8"))
        self._channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print
        self._began, self._tokens = 0.0, 0

    @property
    def in_16_bit(self) -> bool:
        """Whether autocast computes in bf16, over weights in that."""
        return bool(self.job["base"] != "fp32")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not in NF4."""
        return torch.bfloat16 if self.in_16_bit else torch.float32

    def counted(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """A collator that counts the real tokens of what it makes."""

        def counting(rows: Sequence[Any]) -> dict[str, Any]:
            batch = collate(rows)
            self._tokens += int(batch["attention_mask"].sum())
            return batch

        return counting

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        sys.stdin.readline()
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tell(seconds=time.process_time() - self._began, tokens=self._tokens)
        self._tokens = 0

    def tell(self, **told: float) -> None:
        self._channel.write(json.dumps(told) + "\n")
        self._channel.flush()

    def end(self, model: Any) -> None:
        """Tell the loss per learned token of held-out rows, and the largest resident set. Pairs: only the latter."""
        peak = peak_mib()
        if "pairs" in self.job:
            self.tell(peak=peak)
            return
        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for row in self.job["held_out"]:
                learned = sum(label != IGNORED for label in row["labels"][1:])
                inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
                total, count = total + float(model(**inputs).loss) * learned, count + learned
        self.tell(loss=total / count, peak=peak)


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def padded(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Rows of one length, as a data collator makes them."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], pad),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], IGNORED),
    }


def quantization() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def keep_nf4_in_training_mode(model: Any) -> None:
    """Else a mere evaluation on a processor ruins the layers, whatever tool it is."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state"):
            module.train(True)
            module.train = lambda mode=True, module=module: module
