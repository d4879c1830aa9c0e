"""The same training by transformers' Trainer and peft alone, for comparison: prints tokens a second and the peak.

    python -m tests.gpu.plain_trainer MODEL ROWS METHOD STEPS BATCH LENGTH DEVICE

Rows are `messages`. All tokens of a row are counted, as loractl counts them; padding is not.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    import torch

    model, rows, method, steps, batch, length, device = sys.argv[1:]
    told = speed(model, Path(rows), method, int(steps), int(batch), int(length), device)
    peak = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    print(json.dumps({"tokens_per_second": told, "peak": peak}))


def speed(model: str, rows: Path, method: str, steps: int, batch: int, length: int, device: str) -> float:
    """Tokens a second over all steps but the first two."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    data = [{"input_ids": ids(tokenizer, messages)[:length]} for messages in texts]
    if method == "qlora":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        base = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": device}
        )
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
        base.enable_input_require_grads()
    adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012  one a run

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, bf16=True, report_to=[],
            save_strategy="no", logging_steps=1, gradient_checkpointing=True, use_cpu=device == "cpu",
            gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        Trainer(model=adapted, args=arguments, train_dataset=data, data_collator=collator, callbacks=[Clock()]).train()
    mean = sum(len(row["input_ids"]) for row in data) / len(data)
    ends = Clock.ends[min(1, len(Clock.ends) - 2) :]
    return round(mean * batch * (len(ends) - 1) / (ends[-1] - ends[0]), 1)


def ids(tokenizer: Any, messages: Any) -> list[int]:
    return list(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids)


if __name__ == "__main__":
    main()
