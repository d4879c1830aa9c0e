"""loractl's engine with one training on pairs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

from gate import Gate, peak_mib
from transformers import TrainingArguments, set_seed

from loractl.common.data.formats import parse_each
from loractl.common.data.rows import RawRow
from loractl.common.job.method import Method
from loractl.common.job.sections import DataFormat
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import choose_precision, compute_in
from loractl.worker.base.kernels import load_kernels
from loractl.worker.base.learner import Learner
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.data.forms import form_of
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.engine import Engine
from loractl.worker.engine.loop import MemberRows, TrainingLoop
from loractl.worker.engine.pairs import PairLoss
from loractl.worker.engine.passes.choice import shared_base
from loractl.worker.engine.passes.shared import SharedPass
from loractl.worker.training.reference import FrozenReference

load_kernels()
gate = Gate(sys.argv[1])
job, dtype = gate.job, str(gate.dtype).removeprefix("torch.")
spec = JobSpec.model_validate(
    {
        "name": "benchmark", "base_model": job["model"], "method": "qlora" if job["base"] == "nf4" else "lora",
        "task_type": "preference", "preference": {"beta": job["beta"]}, "dataset": {"path": "x.jsonl"},
        "lora": job["lora"], "training": {"dtype": dtype},
    }
)  # fmt: skip
method, precision = Method(spec.method), choose_precision("cpu", dtype)
base = shared_base(load_base(job["model"], method, "cpu", precision), precision)
assert base is not None
set_seed(0)
adapted = add_adapter(base.view(), spec, method)
compute_in(adapted, precision)
tokenizer, form = load_tokenizer(job["model"]), form_of(DataFormat.PREFERENCE_TEXT)
raw = [RawRow(number=n, value=pair) for n, pair in enumerate(job["pairs"])]
rows = [
    form.shortened(row, job["max_length"])
    for example in parse_each(raw, DataFormat.PREFERENCE_TEXT, "pairs")[0]
    for row in form.encode(example, tokenizer)
]


class Counted(SharedPass):
    def tokens(self, rows: Sequence[TokenRow]) -> int:
        gate.count(found := super().tokens(rows))
        return found


arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), max_steps=job["steps"], per_device_train_batch_size=job["batch"],
    learning_rate=job["learning_rate"], bf16=gate.in_16_bit, use_cpu=True, save_strategy="no", report_to=[],
    disable_tqdm=True, optim="adamw_torch_fused", train_sampling_strategy="sequential", data_seed=0, seed=0,
)  # fmt: skip
loss = PairLoss(spec.preference)
with Engine().session(adapted.device) as session:
    forward = Counted(base, adapted, streams=session.streams, loss=loss)
    learner = Learner(model=adapted, tokenizer=tokenizer, precision=precision, scorer=forward)
    loss.reference = FrozenReference(learner, {})
    TrainingLoop(session, forward, arguments, MemberRows(train=rows, held_out=[]), (gate,)).run()
gate.tell(peak=peak_mib())
