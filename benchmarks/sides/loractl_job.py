"""loractl's engine with one training, on rows that are tokens already or on pairs of plain text."""

from __future__ import annotations

import sys
import tempfile

from gate import Gate
from transformers import TrainingArguments, set_seed

from loractl.common.data.formats import parse_each
from loractl.common.data.rows import RawRow
from loractl.common.job.method import Method
from loractl.common.job.sections import DataFormat
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import choose_precision, compute_in
from loractl.worker.base.kernels import load_kernels
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Learner, load_base, load_tokenizer
from loractl.worker.data.row_forms import form_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loop import TrainingLoop, TrainingRows
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.recipe.kinds import trained_kind

load_kernels()
gate = Gate(sys.argv[1])
job, dtype = gate.job, str(gate.dtype).removeprefix("torch.")
spec = JobSpec.model_validate(
    {
        "name": "benchmark", "base_model": job["model"], "method": "qlora" if job["base"] == "nf4" else "lora",
        "dataset": {"path": "x.jsonl"}, "lora": job["lora"], "training": {"dtype": dtype},
        "task_type": "preference" if "pairs" in job else "CAUSAL_LM",
    }
)  # fmt: skip
method, precision = Method(spec.method), choose_precision("cpu", dtype)
base = load_base(job["model"], method, "cpu", precision)
set_seed(0)
adapted = add_adapter(base, spec, method)
compute_in(adapted, precision)


class Counted(LeanPass):
    def tokens(self, rows: list[TokenRow]) -> int:
        gate.count(found := super().tokens(rows))
        return found


arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), max_steps=job["steps"], per_device_train_batch_size=job["batch"],
    learning_rate=job["learning_rate"], bf16=gate.in_16_bit, use_cpu=True, save_strategy="no", report_to=[],
    disable_tqdm=True, optim="adamw_torch_fused", train_sampling_strategy="sequential", data_seed=0, seed=0,
)  # fmt: skip
tokenizer, loss = load_tokenizer(job["model"]), trained_kind(spec).loss(spec)
if "pairs" in job:
    raw = [RawRow(number=n, value=pair) for n, pair in enumerate(job["pairs"])]
    form, examples = form_of(DataFormat.PREFERENCE_TEXT), parse_each(raw, DataFormat.PREFERENCE_TEXT, "pairs")[0]
    rows = [form.shortened(row, job["max_length"]) for one in examples for row in form.encode(one, tokenizer)]
else:
    rows = [TokenRow(number=n, **row) for n, row in enumerate(job["train"])]
forward = Counted(adapted, precision, loss=loss)
learner = Learner(model=adapted, tokenizer=tokenizer, precision=precision, scorer=forward)
trained_kind(spec).refer(forward.loss, learner)
TrainingLoop(forward, arguments, TrainingRows(train=rows, held_out=[]), (gate,)).run()
gate.end(adapted)
