"""The same training by transformers' Trainer and peft alone, as their tutorials have it, for comparison."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from loractl.worker.data.tokens import IGNORED, TokenRow

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .solo import Course


def train(course: Course, clock: TrainerCallback, *, liger: bool = False) -> Any:
    """Train on the course's rows, with `liger` by Liger's kernels; returns the adapted model."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, set_seed

    base = load(course)
    if course.method == "qlora":
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=course.recomputes, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        if course.device == "cpu":
            from loractl.worker.base.arithmetic import keep_nf4_in_training_mode

            keep_nf4_in_training_mode(base)  # else bitsandbytes ruins them there in the first evaluation
    else:
        base.enable_input_require_grads()
    set_seed(course.seed)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **course.lora))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=adapted,
            args=course.arguments(
                folder,
                remove_unused_columns=False,
                gradient_checkpointing=course.recomputes,
                use_liger_kernel=liger,
            ),
            train_dataset=[{"input_ids": row.input_ids, "labels": row.labels} for row in course.train],
            data_collator=lambda rows: padded(rows, course.pad),
            callbacks=[clock],
        ).train()
    return adapted


def load(course: Course) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0 if course.device == "cuda" else "cpu"}}
    if course.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(course.model, **options)


def padded(rows: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Rows of one length, as transformers' collator for labels makes them."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, fill: int) -> Any:
        return torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", pad), "attention_mask": mask, "labels": filled("labels", IGNORED)}


def held_out_loss(model: Any, rows: list[TokenRow], device: str) -> float:
    """The loss per learned token, row by row, of any adapted model."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        for row in rows:
            learned = sum(label != IGNORED for label in row.labels[1:])
            ids, labels = (torch.tensor([values], device=device) for values in (row.input_ids, row.labels))
            total, count = total + float(model(input_ids=ids, labels=labels).loss) * learned, count + learned
    return total / count
