"""The recipe: one fine-tune from top to bottom. QLoRA is LoRA on a base in NF4, not a recipe of its own."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from loractl.common.spec import JobSpec, Method
from loractl.common.status import Reason, Stage

from .checkpoint import Checkpoint, close_checkpoint, newest_checkpoint
from .data import PreparedData, collate, prepare_data
from .evaluate import evaluate
from .memory import peak_memory
from .model import (
    Precision,
    TrainingFailed,
    add_adapter,
    choose_precision,
    load_base,
    load_tokenizer,
    load_trained,
)
from .protocol import Ended, Note, StageChanged, Start, Stepped, Told
from .report import build_report, write_model_card, write_report


class Stopped(Exception):
    """The supervisor asked for an end."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a step of the recipe may look at: the order, where to tell, and whether to stop."""

    order: Start
    tell: Callable[[Told], None]
    stop: threading.Event = field(default_factory=threading.Event)
    save_on_stop: threading.Event = field(default_factory=threading.Event)
    stages: list[Stage] = field(default_factory=list)  # those that have begun

    @property
    def spec(self) -> JobSpec:
        return self.order.spec

    def stage(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.tell(StageChanged(job_id=self.order.job_id, stage=stage))

    def note(self, kind: str, text: str, resumed_from_step: int | None = None) -> None:
        self.tell(Note(job_id=self.order.job_id, kind=kind, text=text, resumed_from_step=resumed_from_step))

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped


def train(run: Run) -> Ended:
    """Prepare, train, evaluate, and leave adapter and report in the order's output folder."""
    order, spec, began = run.order, run.spec, time.time()
    out = Path(order.output_dir)

    # 1. The data, before any memory is taken.
    run.stage(Stage.PREPARING)
    set_seed(spec.training.seed)
    tokenizer = load_tokenizer(spec.base_model)
    data = prepare_data(
        spec.dataset, order.data_path, order.eval_path, order.data_sha256, tokenizer, Path(order.cache_dir)
    )
    _note_data(run, data)
    run.check_stop()

    # 2. The base model, in NF4 for QLoRA, and a fresh adapter.
    precision = choose_precision(order.device)
    base = load_base(spec.base_model, order.method, order.device, precision)
    model = add_adapter(base, spec, order.method)

    # 3. Train, from the newest checkpoint of this very training if there is one.
    run.stage(Stage.TRAINING)
    arguments = training_arguments(order, precision)
    log = TrainingLog(run, data)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": r.input_ids, "labels": r.labels} for r in data.train.rows],
        eval_dataset=[{"input_ids": r.input_ids, "labels": r.labels} for r in data.held_out.rows],
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
        callbacks=[log],
    )
    found = _resume(run, data)
    if found is not None and found.finished:
        load_trained(model, found.path)  # the Trainer would take one step more before it saw that none is left
        log.read_history(found.path)
    else:
        trainer.train(resume_from_checkpoint=str(found.path) if found else None)
        if run.stop.is_set() and trainer.state.global_step < trainer.state.max_steps:
            raise Stopped
    check_finite(model)

    # 4. Keep the adapter before anything else can fail.
    model.save_pretrained(str(out / "adapter"), safe_serialization=True)
    tokenizer.save_pretrained(str(out / "adapter"))
    (out / "job.json").write_text(json.dumps(_resolved(order, arguments), indent=1), "utf-8")

    # 5. Base against tuned on rows that were never trained on.
    run.stage(Stage.EVALUATING)
    evaluation = evaluate(model, tokenizer, data, spec, run.check_stop, log.evaluating())
    peak = peak_memory(order.device)

    # 6. The report, and the manifest's other files.
    report = build_report(
        order,
        data=data,
        evaluation=evaluation,
        log=log,
        arguments=arguments,
        model=model,
        precision=precision,
        peak=peak,
        adapter_dir=out / "adapter",
        wall_seconds=time.time() - began,
    )
    write_report(report, out)
    write_model_card(report, out / "adapter")
    return Ended(job_id=order.job_id, reason=Reason.OK, message=report["verdict"]["short"], vram_peak=peak.bytes)


def training_arguments(order: Start, precision: Precision) -> TrainingArguments:
    """transformers' arguments for a job: the spec's keys under their own names, and what the device decides."""
    t = order.spec.training
    on_gpu = order.device == "cuda"
    return TrainingArguments(
        output_dir=order.checkpoint_dir,
        num_train_epochs=t.num_train_epochs or 1,  # not looked at when max_steps is set
        max_steps=t.max_steps or -1,
        learning_rate=t.learning_rate,
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=order.spec.evaluation.per_device_eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        activation_checkpointing=on_gpu if t.gradient_checkpointing is None else t.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        warmup_steps=t.warmup_steps if t.warmup_steps < 1 else int(t.warmup_steps),
        lr_scheduler_type=t.lr_scheduler_type,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim=_optimizer(order),
        bf16=precision.amp == "bf16",
        fp16=precision.amp == "fp16",
        use_cpu=not on_gpu,
        seed=t.seed,
        data_seed=t.seed,
        logging_steps=t.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would show the last good loss in place of a NaN
        save_strategy="steps",
        save_steps=t.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if t.eval_steps else "no",
        eval_steps=t.eval_steps,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )


class TrainingLog(TrainerCallback):
    """Watches a training: tells the supervisor, closes checkpoints, ends it when it diverges or must stop."""

    def __init__(self, run: Run, data: PreparedData) -> None:
        self._run = run
        self._belongs_to = training_hash(run.order, data)
        self._epoch_tokens = data.train.tokens
        self.train_losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.first_step = 0
        self.steps = 0  # done so far, resumed ones included
        self.total_steps = 0
        self.seconds = 0.0  # inside steps: evaluations and checkpoints left out
        self.tokens = 0.0
        self._first_epoch = 0.0
        self._step_began = 0.0
        self._told = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens, padding left out, per second inside training steps."""
        return self.tokens / self.seconds if self.seconds > 0 and self.tokens > 0 else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step = self.steps = state.global_step
        self.total_steps, self._first_epoch = state.max_steps, state.epoch or 0.0
        self._step()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.monotonic() - self._step_began
        self.steps = state.global_step
        # the share of epochs passed counts the short last batch of each rightly
        self.tokens = (state.epoch - self._first_epoch) * self._epoch_tokens
        control.should_log |= state.global_step >= state.max_steps  # the last loss belongs to the curve
        if self._run.stop.is_set():
            control.should_training_stop = True
            control.should_save = self._run.save_on_stop.is_set()
        if time.monotonic() - self._told > 1:
            self._step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise TrainingFailed(Reason.DIVERGED, f"{name} became {logs[name]} at step {state.global_step}")
        if "loss" in logs:
            self.train_losses.append((state.global_step, logs["loss"]))
        if "eval_loss" in logs:
            self.eval_losses.append((state.global_step, logs["eval_loss"]))
        told = ("loss", "eval_loss", "learning_rate", "grad_norm")
        known: dict[str, float] = {name: float(logs[name]) for name in told if name in logs}
        if known:
            self._step(known)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        finished = state.global_step >= state.max_steps
        close_checkpoint(folder, step=state.global_step, finished=finished, belongs_to=self._belongs_to)
        self._run.note("saved", f"saved step {state.global_step}")

    def read_history(self, checkpoint: Path) -> None:
        """Take the course of a finished training from its last checkpoint."""
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        self.first_step = self.steps = self.total_steps = state["global_step"]
        self.train_losses = [(e["step"], e["loss"]) for e in state["log_history"] if "loss" in e]
        self.eval_losses = [(e["step"], e["eval_loss"]) for e in state["log_history"] if "eval_loss" in e]
        self._step()

    def evaluating(self) -> Callable[[int, int], None]:
        """A progress function for the evaluation: tells how long the rest will take."""
        began = time.monotonic()

        def tell(done: int, of: int) -> None:
            left = (time.monotonic() - began) * (of - done) / max(1, done)
            job_id = self._run.order.job_id
            self._run.tell(Stepped(job_id=job_id, step=self.steps, total_steps=self.total_steps, eta_seconds=left))

        return tell

    def _step(self, metrics: dict[str, float] | None = None) -> None:
        self._told = time.monotonic()
        done = self.steps - self.first_step
        left = (self.total_steps - self.steps) * self.seconds / done if done else None
        self._run.tell(
            Stepped(
                job_id=self._run.order.job_id,
                step=self.steps,
                total_steps=self.total_steps,
                metrics=metrics or {},
                tokens_per_second=self.tokens_per_second,
                eta_seconds=left,
            )
        )


def check_finite(model: Any) -> None:
    """A training may diverge in its last steps, after the last loss was logged. Raises TrainingFailed."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise TrainingFailed(Reason.DIVERGED, f"the trained weights are not finite ({name})")


def training_hash(order: Start, data: PreparedData) -> str:
    """What a checkpoint belongs to: with another batch size, data or method a resume would run, and be wrong."""
    rows = hashlib.sha256(json.dumps([r.input_ids for r in data.train.rows]).encode()).hexdigest()
    parts = [order.spec.model_dump(mode="json", include={"base_model", "lora", "training"}), order.method.value, rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _resume(run: Run, data: PreparedData) -> Checkpoint | None:
    folders = [Path(run.order.checkpoint_dir), *map(Path, run.order.earlier_checkpoints)]
    found = newest_checkpoint(folders, training_hash(run.order, data))
    if found is not None:
        run.note("resumed", f"resumed from the checkpoint of step {found.step}", resumed_from_step=found.step)
    return found


def _optimizer(order: Start) -> str:
    """auto: paged 8-bit AdamW where it helps, that is where memory is scarce; on a CPU there is nothing to page."""
    if order.spec.training.optim != "auto":
        return order.spec.training.optim
    return "paged_adamw_8bit" if order.method is Method.QLORA and order.device == "cuda" else "adamw_torch"


def _note_data(run: Run, data: PreparedData) -> None:
    facts = data.facts()
    text = f"data: {facts['train_rows']} rows to train on, {facts['held_out_rows']} held out; "
    text += f"format {data.format.value} ({data.why})"
    for key, words in (
        ("truncated_rows", "truncated"),
        ("too_long_rows_dropped", "dropped as too long"),
        ("bad_rows_dropped", "dropped as bad"),
        ("overlap_rows_dropped", "of the held-out file left out because they are trained on"),
    ):
        if facts[key]:
            text += f"; {facts[key]} {words}"
    run.note("data", text)


def _resolved(order: Start, arguments: TrainingArguments) -> dict[str, Any]:
    """The job as it ran: the spec, the method taken, and transformers' arguments."""
    taken = {k: v for k, v in arguments.to_dict().items() if isinstance(v, (str, int, float, bool, type(None)))}
    return {
        "spec": order.spec.model_dump(mode="json"),
        "method": order.method.value,
        "device": order.device,
        "torch": torch.__version__,
        "training_arguments": taken,
    }
