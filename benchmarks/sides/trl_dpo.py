"""TRL's DPOTrainer, as its documentation has it for LoRA and QLoRA, on pairs of plain text.

Runs in an environment of its own: python -m venv X; X/bin/pip install trl peft bitsandbytes
"""

from __future__ import annotations

import sys
import tempfile

from datasets import Dataset
from gate import Gate, keep_nf4_in_training_mode, quantization
from peft import LoraConfig
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

gate = Gate(sys.argv[1])
job = gate.job
options = {"quantization_config": quantization(), "device_map": {"": "cpu"}} if job["base"] == "nf4" else {}
set_seed(0)
trainer = DPOTrainer(
    model=job["model"],
    args=DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=job["steps"], per_device_train_batch_size=job["batch"],
        learning_rate=job["learning_rate"], bf16=gate.in_16_bit, use_cpu=True, save_strategy="no", report_to=[],
        disable_tqdm=True, seed=0, max_length=job["max_length"], gradient_checkpointing=False, beta=job["beta"],
        train_sampling_strategy="sequential", model_init_kwargs={"dtype": gate.dtype, **options},
    ),
    train_dataset=Dataset.from_list(job["pairs"]),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **job["lora"]),
    callbacks=[gate],
)  # fmt: skip
keep_nf4_in_training_mode(trainer.model)
trainer.data_collator = gate.counted(trainer.data_collator)
trainer.train()
gate.end(trainer.model)
