"""The recipe: one fine-tune from top to bottom. QLoRA is LoRA on a base in NF4, not a recipe of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from loractl.common.job.adjustment import Adjustment, adjusted, in_words, next_adjustment
from loractl.common.job.spec import JobSpec, Method
from loractl.common.job.status import Reason, Stage
from loractl.common.memory.plan import predict
from loractl.common.placement.rule import Need
from loractl.common.store.records import HELD_OUT_LOSS
from loractl.common.units import gib
from loractl.worker.base.adapter import load_trained, load_weights, save_adapter, save_weights
from loractl.worker.base.arithmetic import Precision, choose_precision, evaluating, whole_modules
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import Gauge, hold_to, release
from loractl.worker.base.head import Head
from loractl.worker.base.identity import identify
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.data.batch import collate, inputs_of
from loractl.worker.data.check import warnings_about
from loractl.worker.data.lengths import lengths_of
from loractl.worker.data.packing import check_apart, packed
from loractl.worker.data.prepared import PreparedData, prepare_data, prepare_regression
from loractl.worker.data.tokens import TokenRow
from loractl.worker.evaluation.classifier import evaluate_classifier, head_loss
from loractl.worker.evaluation.evaluation import Evaluation, Work, evaluate
from loractl.worker.evaluation.harness import check_package, find_tasks, score_tasks
from loractl.worker.evaluation.report import build_report, write_model_card, write_report
from loractl.worker.protocol.messages import Adjusted, Ended, Note, Planned, Saved, StageChanged, Start, Stepped, Told

from .checkpoint import PROOF_TOLERANCE, Checkpoint, close_checkpoint, newest_checkpoint, withdraw
from .probe import DoesNotFit, Probe, longest
from .traced_plan import trace_plan

PROOF_ROWS = 2
PROOF_TOKENS = 256
"""What a checkpoint's proof is measured on: enough to tell another base or a damaged adapter, cheap beside a step."""


BEST = "best.json"
BEST_WEIGHTS = "best_adapter.safetensors"
"""In a checkpoint: which evaluation was the best so far, and its adapter where the job asks for the best one."""


class Stopped(Exception):
    """The supervisor asked for an end."""


@dataclass(kw_only=True)
class Run:
    """What a step of the recipe may look at: the order, where to tell, and whether to stop."""

    order: Start
    tell: Callable[[Told], None]
    stop: threading.Event = field(default_factory=threading.Event)
    save_on_stop: threading.Event = field(default_factory=threading.Event)
    stages: list[Stage] = field(default_factory=list)  # those that have begun
    adjustment: Adjustment = field(init=False)  # what out-of-memory has changed so far
    changes: list[str] = field(init=False)  # the same in words, one a step down
    gauge: Gauge = field(init=False)

    def __post_init__(self) -> None:
        self.adjustment = self.order.adjustment
        self.changes = list(self.order.changes)
        self.gauge = Gauge(self.order.device, self.order.gpu)

    @property
    def spec(self) -> JobSpec:
        """The job as it runs: what it asks for, adjusted to the memory that there is."""
        return adjusted(self.order.spec, self.adjustment)

    @property
    def on_gpu(self) -> bool:
        return self.order.device == "cuda"

    def stage(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.tell(StageChanged(job_id=self.order.job_id, stage=stage))

    def note(self, kind: str, text: str, resumed_from_step: int | None = None) -> None:
        self.tell(Note(job_id=self.order.job_id, kind=kind, text=text, resumed_from_step=resumed_from_step))

    def adjust(self, adjustment: Adjustment) -> None:
        """Go on with less memory."""
        self.changes.append(in_words(self.order.spec, self.adjustment, adjustment))
        self.note("memory", self.changes[-1])
        self.adjustment = adjustment
        self.tell(Adjusted(job_id=self.order.job_id, adjustment=adjustment))

    def adjust_evaluation(self, batch: int) -> None:
        """Evaluate fewer rows at once."""
        self.adjust(replace(self.adjustment, eval_batch=batch))

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped


def train(run: Run) -> Ended:
    """Prepare, train, evaluate, and leave adapter and report in the order's output folder."""
    order, began = run.order, time.time()
    out = Path(order.output_dir)

    check_trackers(run.spec)
    check_package(run.spec)
    # 1. The data, before any memory is taken.
    run.stage(Stage.PREPARING)
    set_seed(run.spec.training.seed)
    tokenizer = load_tokenizer(run.spec.base_model, run.spec.revision, run_code=order.run_code)
    data = prepare_data(
        run.spec.dataset, order.data_path, order.eval_path, order.data_sha256, tokenizer, Path(order.cache_dir)
    )
    if order.regression_path is not None:
        name = run.spec.evaluation.regression or order.regression_path
        other, commit = prepare_regression(
            run.spec.dataset, name, order.regression_path, data.train_examples, tokenizer
        )
        data = replace(data, regression=other, commits=data.commits | ({"regression": commit} if commit else {}))
    data = packed(replace(data, warnings=warnings_about(run.spec, data, tokenizer)), run.spec)
    _note_data(run, data)
    tasks = find_tasks(run.spec, order.lm_eval_tasks)
    plan_again(run, data)
    run.check_stop()

    # 2. The base model, in NF4 for QLoRA, and a fresh adapter.
    precision = choose_precision(order.device, run.spec.training.dtype)
    base = load_base(
        run.spec.base_model,
        order.method,
        order.device,
        precision,
        run.spec.revision,
        run_code=order.run_code,
        attention=run.spec.training.attn_implementation,
        head=_head(run.spec, data, tokenizer),
    )
    identity = identify(run.spec.base_model, run.spec.revision, Path(order.cache_dir))
    model = add_adapter(base, run.spec, order.method)
    if data.packed is not None:
        check_apart(model, data.packed, tokenizer.pad_token_id)

    # 3. Train, from the newest checkpoint of this very training if there is one.
    log = TrainingLog(run, data, tokenizer)
    arguments = fit(run, model, tokenizer, data, precision, log)
    log.take_best(model)
    check_finite(model)

    # 4. Keep the adapter before anything else can fail.
    save_adapter(model, tokenizer, order.spec, out / "adapter")
    (out / "job.json").write_text(json.dumps(_resolved(run, arguments), indent=1), "utf-8")

    # 5. Base against tuned on rows that were never trained on.
    run.stage(Stage.EVALUATING)
    measure = evaluate_classifier if data.label_names else evaluate
    evaluation = measure(model, tokenizer, data, run.spec, precision.base, run.check_stop, log.evaluating())
    log.tell_held_out(evaluation)
    if tasks is not None:
        run.note("evaluation", f"scoring base and tuned on {', '.join(run.spec.evaluation.lm_eval)} of lm_eval")
        scored = score_tasks(model, tokenizer, run.spec, tasks, precision.base, run.check_stop)
        evaluation = replace(evaluation, benchmarks=scored)

    # 6. The report, and the manifest's other files.
    report = build_report(
        order,
        base=identity,
        data=data,
        evaluation=evaluation,
        log=log,
        arguments=arguments,
        adjustment=run.adjustment,
        changes=run.changes,
        model=model,
        precision=precision,
        peaks=run.gauge.look(),
        peak_kind=run.gauge.kind,
        threads=torch.get_num_threads(),
        adapter_dir=out / "adapter",
        wall_seconds=time.time() - began,
    )
    write_report(report, out)
    write_model_card(report, out / "adapter")
    return Ended(job_id=order.job_id, reason=Reason.OK, message=report["verdict"]["short"], peaks=run.gauge.look())


def _head(spec: JobSpec, data: PreparedData, tokenizer: Any) -> Head | None:
    """A classifier's head, for the labels of its training rows; None for a job that learns to answer."""
    if not data.label_names:
        return None
    return Head(labels=data.label_names, pad=tokenizer.pad_token_id, seed=spec.training.seed)


def check_trackers(spec: JobSpec) -> None:
    """Refuse a training.report_to that this worker can't serve. Raises TrainingFailed(bad_spec)."""
    for name in spec.training.report_to:
        if importlib.util.find_spec(name) is None:
            raise TrainingFailed(Reason.BAD_SPEC, f"training.report_to: the package {name} is not on this worker")
    if "wandb" in spec.training.report_to and not {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys():
        what = "wandb needs its owner's account: WANDB_API_KEY, or WANDB_MODE=offline"
        raise TrainingFailed(Reason.BAD_SPEC, f"training.report_to: {what} is not set on this worker")


def plan_again(run: Run, data: PreparedData) -> None:
    """Tell what the job needs for the lengths of its own rows, which submit could not know.

    An architecture that the plan does not know is traced, where memory is a card's. Raises
    TrainingFailed(out_of_memory) when the trace needs more than the card gives: no weight is loaded yet.
    """
    order, spec = run.order, run.spec
    lengths = lengths_of(data)
    need = predict(spec, lengths)
    given = order.vram_reserved
    if need.of(order.method) is not None or given is None or order.gpu == "cpu":
        _tell_plan(run, need)
        return
    try:
        traced = trace_plan(spec.base_model, spec, order.method, lengths).need_bytes
    except Exception as error:  # noqa: BLE001  a trace is a help; what is wrong with the model, its loading says better
        run.note("plan", f"no plan by trace: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}")
        return
    _tell_plan(run, replace(need, **{order.method.value: traced}))
    if traced > given:
        raise TrainingFailed(
            Reason.OUT_OF_MEMORY, f"its plan by trace is {gib(traced)} GiB, the card gives {gib(given)} GiB"
        )


def _tell_plan(run: Run, need: Need) -> None:
    run.tell(Planned(job_id=run.order.job_id, lora=need.lora, qlora=need.qlora))
    if run.on_gpu:
        hold_to(lowered_limit(run.order, need), "cuda", run.order.gpu)


def lowered_limit(order: Start, need: Need) -> int | None:
    """Bytes of the card that are still this attempt's, once its need is known better: the rest goes to other jobs.

    The reservation is the plan times what was learned from measured peaks, and stays so.
    """
    size, given = need.of(order.method), order.memory_limit
    if size is None or given is None:
        return given
    learned = order.vram_reserved / order.vram_planned if order.vram_reserved and order.vram_planned else 1.0
    return min(given, int(size * learned))


def fit(
    run: Run, model: Any, tokenizer: Any, data: PreparedData, precision: Precision, log: TrainingLog
) -> TrainingArguments:
    """Train the model's adapter; batches that do not fit are made smaller before the first step.

    Returns the arguments that it was trained with. Raises TrainingFailed, Stopped, and out-of-memory in mid-training as
    it comes: the supervisor then starts a new process, whose memory is whole, from the last checkpoint.
    """
    log.resumed = found = _resume(run, data)
    if found is not None and found.finished:
        run.stage(Stage.TRAINING)
        load_trained(model, found.path)  # the Trainer would take one step more before it saw that none is left
        log.check_resumed(model)
        log.read_history(found.path)
        return training_arguments(run.order, run.spec, precision)
    while True:
        arguments = training_arguments(run.order, run.spec, precision)
        failure = _fit_once(run, model, tokenizer, data, arguments, log, found)
        release()  # of what did not fit, or of optimizer and gradients, which the evaluation needs no more
        if failure is None:
            return arguments
        lighter = next_adjustment(run.order.spec, run.adjustment, on_gpu=run.on_gpu)
        if lighter is None:
            tokens = len(longest(data.trained_rows, 1)[0].input_ids)
            what = f"one row of {tokens} tokens does not fit, even with gradient checkpointing"
            raise TrainingFailed(Reason.OUT_OF_MEMORY, f"{what}: {failure}")
        run.adjust(lighter)


def _fit_once(
    run: Run,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    arguments: TrainingArguments,
    log: TrainingLog,
    found: Checkpoint | None,
) -> str | None:
    """Train to the end; what torch says where the longest batch does not fit, and nothing was trained."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(run.order.output_dir) / "tensorboard")  # stored with the result
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[inputs_of(row) for row in data.trained_rows],
        eval_dataset=[inputs_of(row) for row in data.held_out.rows],
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
        compute_loss_func=head_loss(arguments.label_smoothing_factor) if data.label_names else None,
    )
    # Without a limit no allocation fails on a processor: the kernel kills whom it chooses. A probe would find nothing.
    if run.on_gpu or run.order.memory_limit is not None:
        trainer.add_callback(Probe(trainer, tokenizer, data, run.spec.evaluation.max_rows, run.adjust_evaluation))
    trainer.add_callback(log)  # after the probe: it says that training begins
    try:
        trainer.train(resume_from_checkpoint=str(found.path) if found else None)
    except DoesNotFit as failure:
        # The model keeps the autocast that this Trainer's accelerator put around it: the next one knows it as prepared.
        return str(failure)
    if run.stop.is_set() and trainer.state.global_step < trainer.state.max_steps and log.stopped_early is None:
        raise Stopped
    return None


def training_arguments(order: Start, spec: JobSpec, precision: Precision) -> TrainingArguments:
    """transformers' arguments for a job: the spec's keys under their own names, and what the device decides.

    `spec` is the order's, adjusted to the memory that there is.
    """
    t = spec.training
    on_gpu = order.device == "cuda"
    return TrainingArguments(
        output_dir=order.checkpoint_dir,
        num_train_epochs=t.num_train_epochs or 1,  # not looked at when max_steps is set
        max_steps=t.max_steps or -1,
        learning_rate=t.learning_rate,
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=spec.evaluation.per_device_eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        activation_checkpointing=on_gpu if t.gradient_checkpointing is None else t.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        warmup_steps=t.warmup_steps if t.warmup_steps < 1 else int(t.warmup_steps),
        lr_scheduler_type=t.lr_scheduler_type,
        lr_scheduler_kwargs=t.lr_scheduler_kwargs or None,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        adam_epsilon=t.adam_epsilon,
        label_smoothing_factor=t.label_smoothing_factor,
        neftune_noise_alpha=t.neftune_noise_alpha,
        train_sampling_strategy=t.train_sampling_strategy,
        torch_compile=t.torch_compile,
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
        report_to=[*t.report_to],
        run_name=f"{order.spec.name}-{order.job_id}",
        disable_tqdm=True,
    )


class TrainingLog(TrainerCallback):
    """Watches a training: tells the supervisor, closes checkpoints, ends it when it diverges or must stop."""

    def __init__(self, run: Run, data: PreparedData, tokenizer: Any) -> None:
        self._run = run
        self._belongs_to = belongs_to(run.order, data)
        self._proof_rows, self._pad = data.train.rows[:PROOF_ROWS], tokenizer.pad_token_id
        self.resumed: Checkpoint | None = None  # what this training goes on from
        self.best: tuple[int, float] | None = None  # (step, held-out loss) of the best evaluation
        self.stopped_early: int | None = None  # the step at which early stopping ended it
        self._epoch_tokens = data.train.tokens
        self._epochs = 0.0  # passed so far, resumed ones included
        self.train_losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.first_step = 0
        self.steps = 0  # done so far, resumed ones included
        self.total_steps = 0
        self.seconds = 0.0  # inside steps: evaluations and checkpoints left out
        self.tokens = 0.0
        models = 1 if data.label_names else 2  # base and tuned; a classifier's baseline looks at no text
        self._evaluation_tokens = models * Work.of(data, run.spec, tokenizer).tokens
        # from one step's end to the next one's, whatever came between: evaluations and checkpoints take time too
        self._step_times: deque[float] = deque(maxlen=1000)
        self._first_epoch = 0.0
        self._step_began = 0.0
        self._step_ended = 0.0
        self._told = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens, padding left out, per second inside training steps."""
        return self.tokens / self.seconds if self.seconds > 0 and self.tokens > 0 else None

    @property
    def tokens_seen(self) -> int:
        """Real tokens, padding left out, that the adapter was trained on from its first step on."""
        return round(self._epochs * self._epoch_tokens)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.check_resumed(model)
        self._run.stage(Stage.TRAINING)
        if self.resumed is not None:
            self._bring_best(self.resumed.path)
        self.first_step = self.steps = state.global_step
        self.total_steps, self._first_epoch = state.max_steps, state.epoch or 0.0
        self._take_history(state.log_history)
        self._step_ended = time.monotonic()
        self._step()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.seconds += now - self._step_began
        self._step_times.append(now - self._step_ended)
        self._step_ended = now
        self.steps = state.global_step
        # the share of epochs passed counts the short last batch of each rightly
        self._epochs = state.epoch
        self.tokens = (state.epoch - self._first_epoch) * self._epoch_tokens
        control.should_log |= state.global_step >= state.max_steps  # the last loss belongs to the curve
        if self._run.stop.is_set():
            control.should_training_stop = True
            control.should_save = self._run.save_on_stop.is_set()
        if self._run.stop.is_set() or time.monotonic() - self._told > 1:
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

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Keep the best adapter, and end a training that has stopped getting better."""
        asked, loss = self._run.spec.training, (metrics or {}).get("eval_loss", math.nan)
        if self.best is None or loss < self.best[1]:
            self.best = (state.global_step, loss)
            if asked.load_best_model_at_end:
                save_weights(model, self._best_file)
        since = sum(step > self.best[0] for step, _ in self.eval_losses)
        if asked.early_stopping_patience is not None and since >= asked.early_stopping_patience:
            self.stopped_early = state.global_step
            control.should_training_stop = control.should_save = True

    @property
    def _best_file(self) -> Path:
        return Path(self._run.order.checkpoint_dir) / BEST_WEIGHTS

    def take_best(self, model: Any) -> None:
        """Put the best evaluation's adapter in place of the last one, where the job asks for it; tell of it."""
        if self.stopped_early is not None:
            patience = self._run.spec.training.early_stopping_patience
            self._run.note(
                "training", f"stopped early at step {self.stopped_early}: no better in {patience} evaluations"
            )
        if not self._run.spec.training.load_best_model_at_end or self.best is None:
            return
        load_weights(model, self._best_file)
        self._run.note("training", f"kept the adapter of step {self.best[0]}, held-out loss {self.best[1]:.4f}")

    def _bring_best(self, checkpoint: Path) -> None:
        """What was best before the checkpoint: a resume must not take a worse one for it."""
        told = checkpoint / BEST
        if told.exists():
            best = json.loads(told.read_text())
            self.best = (best["step"], best["loss"])
        if (weights := checkpoint / BEST_WEIGHTS).exists():
            self._best_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(weights, self._best_file)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        finished = state.global_step >= state.max_steps or self.stopped_early is not None
        if self.best is not None:
            (folder / BEST).write_text(json.dumps({"step": self.best[0], "loss": self.best[1]}))
            if self._best_file.exists():
                shutil.copyfile(self._best_file, folder / BEST_WEIGHTS)
        proof = self._proof(model)
        close_checkpoint(folder, step=state.global_step, finished=finished, belongs_to=self._belongs_to, proof=proof)
        self._run.note("saved", f"saved step {state.global_step}")
        self._run.tell(Saved(job_id=self._run.order.job_id, step=state.global_step, path=str(folder)))

    def check_resumed(self, model: Any) -> None:
        """Compare the model with what its checkpoint recorded. Raises TrainingFailed, with the checkpoint withdrawn."""
        saved = self.resumed
        if saved is None or saved.proof is None:
            return
        now = self._proof(model)
        if not abs(now - saved.proof) <= PROOF_TOLERANCE * max(1.0, abs(saved.proof)):
            withdraw(saved)
            raise TrainingFailed(
                Reason.TRAINER_ERROR,
                f"the checkpoint of step {saved.step} does not resume: the loss on its proof rows is {now:.4f}, "
                f"it recorded {saved.proof:.4f}; is the base model another one on this box?",
            )

    def _proof(self, model: Any) -> float:
        """The model's loss on the first rows, in eval mode: it draws no random number and changes nothing."""
        compute = choose_precision(self._run.order.device, self._run.spec.training.dtype).base
        with whole_modules(model, compute):
            return proof_loss(model, self._proof_rows, self._pad)

    def read_history(self, checkpoint: Path) -> None:
        """Take the course of a finished training from its last checkpoint."""
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        self.first_step = self.steps = self.total_steps = state["global_step"]
        self._epochs = state["epoch"]
        if self.steps < state["max_steps"]:
            self.stopped_early = self.steps
        self._bring_best(checkpoint)
        self._take_history(state["log_history"])
        self._step()

    def _take_history(self, entries: list[dict[str, Any]]) -> None:
        """The losses before a resume belong to the curve."""
        self.train_losses = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        self.eval_losses = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]

    def evaluating(self) -> Callable[[int, int], None]:
        """A progress function for the evaluation: tells how long the rest will take."""
        began = time.monotonic()

        def tell(done: int, of: int) -> None:
            left = (time.monotonic() - began) * (of - done) / max(1, done)
            self._run.tell(
                Stepped(
                    job_id=self._run.order.job_id,
                    step=self.steps,
                    total_steps=self.total_steps,
                    eta_seconds=left,
                    eta_spread_seconds=left,  # scoring says little about generating, which comes after it
                    peaks=self._run.gauge.look(),
                )
            )

        return tell

    def tell_held_out(self, evaluation: Evaluation) -> None:
        """Tell the tuned model's held-out loss: who compares the jobs of a sweep reads no report."""
        loss = next((metric.tuned for metric in evaluation.metrics if metric.name == "loss"), math.nan)
        if math.isfinite(loss):
            metrics = {HELD_OUT_LOSS: loss}
            order = self._run.order
            self._run.tell(Stepped(job_id=order.job_id, step=self.steps, total_steps=self.total_steps, metrics=metrics))

    def _step(self, metrics: dict[str, float] | None = None) -> None:
        self._told = time.monotonic()
        left, spread = remaining(self._step_times, self.total_steps - self.steps)
        if left is not None and self.tokens_per_second:
            # A token that is trained on costs a forward and a backward, in LoRA about as much again (no gradients of
            # the base's weights): read as two that are evaluated. Measured once the evaluation runs.
            left += self._evaluation_tokens / (2 * self.tokens_per_second)
        self._run.tell(
            Stepped(
                job_id=self._run.order.job_id,
                step=self.steps,
                total_steps=self.total_steps,
                metrics=metrics or {},
                tokens_per_second=self.tokens_per_second,
                eta_seconds=left,
                eta_spread_seconds=spread,
                peaks=self._run.gauge.look(),
            )
        )


def remaining(step_times: Sequence[float], steps: int) -> tuple[float | None, float | None]:
    """Seconds that so many more steps will take, and half the width of a 95% interval of them.

    The sum of `steps` new times varies by their own spread and by that of the mean of the n measured ones: its variance
    is s² (steps + steps² / n). The quantile is Student's, expanded around the normal one (Abramowitz and Stegun 1964,
    26.7.5). None before a first step, and for the interval before a third.
    """
    n = len(step_times)
    if n == 0:
        return None, None
    mean = statistics.fmean(step_times)
    if n < 3:
        return steps * mean, None
    z, free = 1.96, n - 1
    quantile = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return steps * mean, quantile * statistics.stdev(step_times, mean) * math.sqrt(steps + steps**2 / n)


def check_finite(model: Any) -> None:
    """A training may diverge in its last steps, after the last loss was logged. Raises TrainingFailed."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise TrainingFailed(Reason.DIVERGED, f"the trained weights are not finite ({name})")


def proof_loss(model: Any, rows: Sequence[TokenRow], pad: int) -> float:
    """The mean loss of a model on a few rows, cut to PROOF_TOKENS, one at a time: of their tokens, or their labels."""
    losses = []
    with evaluating(model):
        for row in rows:
            kept = replace(row, input_ids=row.input_ids[:PROOF_TOKENS], labels=row.labels[:PROOF_TOKENS], starts=())
            batch = collate([inputs_of(kept)], pad)
            if row.label is None:
                batch["labels"] = batch["input_ids"].clone()  # every token: a cut row may hold no learned one
            moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
            losses.append(float(model(**moved).loss))
    return statistics.fmean(losses)


def belongs_to(order: Start, data: PreparedData) -> dict[str, str]:
    """What a checkpoint belongs to: with another batch size, data or method a resume would run, and be wrong.

    The batch is the effective one. In which pieces it is computed, and whether activations are computed twice, changes
    neither the rows of a step nor what a step learns.
    """
    read: list[Any] = [[r.input_ids, r.starts] for r in data.trained_rows]
    if data.label_names:
        read += [data.label_names, [r.label for r in data.trained_rows]]
    rows = hashlib.sha256(json.dumps(read).encode()).hexdigest()
    asked = order.spec.model_dump(mode="json", include={"base_model", "revision", "lora", "training"})
    training = asked["training"]
    training["batch"] = training.pop("per_device_train_batch_size") * training.pop("gradient_accumulation_steps")
    for key in ("gradient_checkpointing", "torch_compile", "report_to"):
        del training[key]
    parts = {
        "base_model": [asked["base_model"], asked["revision"]],
        "lora": asked["lora"],
        "training": training,
        "method": order.method.value,
        "data": rows,
    }
    return {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()}


def _resume(run: Run, data: PreparedData) -> Checkpoint | None:
    folders = [Path(run.order.checkpoint_dir), *map(Path, run.order.earlier_checkpoints)]

    def refused(step: int, differing: list[str]) -> None:
        run.note("refused", f"the checkpoint of step {step} is not resumed: {', '.join(differing)} differ")

    found = newest_checkpoint(folders, belongs_to(run.order, data), refused)
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
    for warning in data.warnings:
        run.note("warning", f"data: {warning}")


def _resolved(run: Run, arguments: TrainingArguments) -> dict[str, Any]:
    """The job as it ran: the spec, what memory changed in it, the method taken, and transformers' arguments."""
    order = run.order
    taken = {k: v for k, v in arguments.to_dict().items() if isinstance(v, (str, int, float, bool, type(None)))}
    return {
        "spec": order.spec.model_dump(mode="json"),
        "adjustment": run.adjustment.as_json(),
        "method": order.method.value,
        "device": order.device,
        "torch": torch.__version__,
        "training_arguments": taken,
    }
