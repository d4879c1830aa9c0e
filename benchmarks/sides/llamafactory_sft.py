"""LLaMA-Factory's supervised fine-tuning, as its documentation has it for LoRA and QLoRA, on rows that are tokens
already. It recomputes blocks by default; the other sides don't, so neither does it here.

Runs in an environment of its own: python -m venv X; X/bin/pip install llamafactory bitsandbytes. Beside a torch without
CUDA it can't import torchaudio, which it needs for sound alone, until lib/_torchaudio.abi3.so of that is removed.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from datasets import Dataset, DatasetDict
from gate import Gate, keep_nf4_in_training_mode
from llamafactory.train.tuner import run_exp


class Counted(Gate):
    """Its collator is out of reach, so the tokens of a step are counted in the rows, which come in order."""

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        keep_nf4_in_training_mode(model)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        size = args.per_device_train_batch_size
        rows = self.job["train"][(state.global_step - 1) * size : state.global_step * size]
        self.count(sum(len(row["input_ids"]) for row in rows))
        super().on_step_end()

    def on_train_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.end(model)


gate = Counted(sys.argv[1])
job, folder = gate.job, tempfile.mkdtemp()
rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in job["train"]]
DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(f"{folder}/rows")
run_exp(
    {
        "stage": "sft", "do_train": True, "model_name_or_path": job["model"], "template": "empty", "dataset": "rows",
        "tokenized_path": f"{folder}/rows", "output_dir": f"{folder}/out", "max_steps": job["steps"],
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": job["lora"]["r"],
        "lora_alpha": job["lora"]["lora_alpha"], "lora_dropout": job["lora"]["lora_dropout"],
        "per_device_train_batch_size": job["batch"], "learning_rate": job["learning_rate"], "bf16": gate.in_16_bit,
        "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "disable_shuffling": True, "disable_gradient_checkpointing": True,
        **({"quantization_bit": 4} if job["base"] == "nf4" else {}),
    },
    callbacks=[gate],
)  # fmt: skip
