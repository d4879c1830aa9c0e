"""The tutorial recipe: transformers' Trainer on peft's model, for NF4 after prepare_model_for_kbit_training."""

from __future__ import annotations

import sys
import tempfile

from gate import Gate, keep_nf4_in_training_mode, padded, quantization
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

gate = Gate(sys.argv[1])
job = gate.job
options = {"quantization_config": quantization(), "device_map": {"": "cpu"}} if job["base"] == "nf4" else {}
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=gate.dtype, **options)
if job["base"] == "nf4":
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    keep_nf4_in_training_mode(model)
set_seed(0)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **job["lora"]))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=job["steps"], per_device_train_batch_size=job["batch"],
        learning_rate=job["learning_rate"], bf16=gate.in_16_bit, use_cpu=True, save_strategy="no", report_to=[],
        disable_tqdm=True, train_sampling_strategy="sequential", remove_unused_columns=False, seed=0,
    ),
    train_dataset=job["train"],
    data_collator=gate.counted(lambda rows: padded(rows, job["pad"])),
    callbacks=[gate],
)  # fmt: skip
trainer.train()
gate.end(trainer.model)
