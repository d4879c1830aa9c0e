"""The recipe: one fine-tune from top to bottom. QLoRA is LoRA on a base in NF4, not a recipe of its own."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from loractl.common.adapter_config import LINEAGE, portable_name
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason, Stage
from loractl.common.model_card import lab_card
from loractl.worker.base.adapter import WEIGHTS, load_stored, save_adapter
from loractl.worker.base.arithmetic import Precision, choose_precision, compute_in, overflows_fp16
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import bytes_of_base
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Head, Learner, load_tokenizer
from loractl.worker.base.source import BaseIdentity, Dates, are_changed, check_folder, dates_of, family_of, traits_of
from loractl.worker.data.lengths import lengths_of
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.prompt import templated
from loractl.worker.data.tokens import APART
from loractl.worker.engine.loss import ForwardPass
from loractl.worker.engine.passes.check_cache import CheckCache
from loractl.worker.engine.passes.choice import forward_pass
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import check_apart
from loractl.worker.engine.ranks.part import DividedPass
from loractl.worker.evaluation.evaluation import Evaluation, EvaluationTask
from loractl.worker.evaluation.harness import check_package, find_tasks, score_tasks
from loractl.worker.evaluation.report import build_report, write_report
from loractl.worker.protocol.messages import Ancestor, Ended, Planned

from .arguments import check_trackers
from .box_files import measurements, pair_scores
from .fit import Callbacks, fit
from .gang import Gang, base_of, gathered
from .need import tell_need, tell_padded
from .reference import FrozenReference
from .resume import checkpoint_to_resume
from .rows import prepare_rows
from .run import Run


def train(run: Run) -> Ended:
    """Prepare, train, evaluate, and leave adapter and report in the order's output folder."""
    order, began = run.order, time.monotonic()
    out = Path(order.output_dir)

    check_trackers(run.spec)
    check_package(run.spec)
    # 1. The data, before any memory is taken.
    run.stage(Stage.PREPARING)
    set_seed(run.spec.training.seed)
    dates = dates_of(run.spec.base_model)
    loaded = load_tokenizer(run.spec.base_model, run.spec.revision, run_code=order.run_code)
    tokenizer = templated(loaded, run.spec.dataset.template, order.day)
    run.say("reads the rows, and turns them into tokens")
    data = prepare_rows(order, run.spec, tokenizer)
    published = templated(loaded, run.spec.dataset.template)
    if tokenizer.chat_template != published.chat_template:
        data = replace(data, prompt_date=order.day)
    _note_data(run, data)
    benchmarks = find_tasks(run.spec, order.lm_eval_tasks)  # they are other people's programs, and may draw
    tell_need(run, data)
    run.check_stop()

    # 2. The base model, in NF4 for QLoRA, a fresh adapter, and the forward pass.
    learner, steps, identity, reference = _ready(run, data, tokenizer, dates)
    fresh = _marks(learner.model)

    # 3. Train, from the newest checkpoint of this same training if there is one.
    callbacks = Callbacks.of(run, learner, data, checkpoint_to_resume(run, data))
    callbacks.best.measures(data)
    arguments = fit(run, learner, steps, data, callbacks)

    # 4. Keep the adapter before anything else can fail.
    if _marks(learner.model) == fresh:
        what = "the training has changed no weight: each of its steps had learning rate 0, or no gradient"
        raise TrainingFailed(Reason.NOT_TRAINED, what)
    _keep(run, learner, published, callbacks)
    (out / "job.json").write_text(json.dumps(_resolved(run, arguments), indent=1), "utf-8")

    # 5. Base against tuned on rows that were never trained on.
    run.stage(Stage.EVALUATING)
    if reference is not None and callbacks.checkpoint is None:  # else some were scored in other micro-batches
        reference.leave()
    kept = measurements(run, learner, identity)
    task = EvaluationTask(learner=learner, data=data, spec=run.spec, check_stop=run.check_stop, kept=kept)
    evaluation, final = _evaluate(run, task, benchmarks, callbacks), _evaluate_final(run, task, callbacks)
    if isinstance(steps, DividedPass):
        steps.end()

    # 6. The report, and the manifest's other files.
    course, wall_seconds = _course(run, learner, callbacks, arguments), time.monotonic() - began
    run.say("hashes the base's files, and writes the report")
    report = build_report(order, identity.wait(run.go_on), learner, data, evaluation, course, wall_seconds, final)
    write_report(report, out)
    (out / "adapter" / "README.md").write_text(lab_card(report), "utf-8")
    return Ended(job_id=order.job_id, reason=Reason.OK, message=report["verdict"]["short"], peaks=run.gauge.look())


def _note_data(run: Run, data: PreparedData) -> None:
    facts = data.facts()
    text = f"data: {facts['train_rows']} rows to train on, {facts['held_out_rows']} held out; "
    text += f"{facts['final_rows']} final, by which nothing is chosen; " if data.final is not None else ""
    text += f"format {data.format.value} ({data.why})"
    text += "".join(f"; {told}" for told in facts["sources"])
    text += f"; its prompts say that it is {facts['prompt_date']}" if facts["prompt_date"] else ""
    if apart := facts["conversations_apart"]:
        text += f"; {apart} conversation{'s' * (apart != 1)} as {facts['rows_of_conversations_apart']} rows, {APART}"
    for key, words in (
        ("truncated_rows", "truncated"),
        ("too_long_rows_dropped", "dropped as too long"),
        ("bad_rows_dropped", "dropped as bad"),
        ("overlap_rows_dropped", "of the held-out file left out as trained on"),
        ("repeated_rows_dropped", "left out as repeated among the held-out rows"),
        ("final_overlap_rows_dropped", "of the final file left out as trained on or held out"),
        ("final_repeated_rows_dropped", "left out as repeated among the final rows"),
    ):
        if facts.get(key):
            text += f"; {facts[key]} {words}"
    if unused := facts["unused_fields"]:
        text += f"; not used: {', '.join(unused)}"
    run.note("data", text)
    for warning in data.warnings:
        run.note("warning", f"data: {warning}")


def _ready(
    run: Run, data: PreparedData, tokenizer: Any, dates: Dates
) -> tuple[Learner, ForwardPass, BaseIdentity, FrozenReference | None]:
    """The model with a fresh adapter, its forward pass, what identifies the base once hashed, and what pairs are
    compared with. `dates`: of the base's files before any was read. Raises TrainingFailed."""
    head = run.kind.head(run.spec, data, tokenizer)
    gang = gathered(run.order, head, tokenizer.pad_token_id)
    learner, identity = _load(run, data, tokenizer, head, gang)
    check_folder(run.spec.base_model)  # a share that has gone away meanwhile has changed nothing
    if are_changed(dates, dates_of(run.spec.base_model)):  # weights of both, or a tokenizer that is not theirs
        raise TrainingFailed(Reason.TRAINER_ERROR, f"base_model {run.spec.base_model} was changed while it was loaded")
    loss, checks = run.kind.loss(run.spec), _checks(run, learner)
    lengths = lengths_of(data)
    longest = max(lengths.train, lengths.evaluate)
    forward, why = forward_pass(learner, run.spec, longest, checks=checks, loss=loss, divided=gang is not None)
    if isinstance(forward, LeanPass):
        learner = replace(learner, scorer=forward)
    else:
        if why is not None:
            tell_padded(run, data, why)
        check_apart(forward, data.packed or ())
    reference = run.kind.refer(forward.loss, learner, pair_scores(run, learner, identity, data))
    return learner, forward if gang is None else gang.lead(forward, run.spec, learner.precision), identity, reference


def _keep(run: Run, learner: Learner, tokenizer: Any, callbacks: Callbacks) -> None:
    """Leave the trained adapter in the order's output folder. Raises TrainingFailed."""
    order, folder = run.order, Path(run.order.output_dir) / "adapter"
    callbacks.best.take(learner.model)
    check_finite(learner.model)
    save_adapter(learner.model, tokenizer, order.spec, folder)
    run.kind.leave(learner.model, folder)
    if order.init_from is not None:
        (folder / LINEAGE).write_text(json.dumps({"init_from": order.init_from.lineage()}, indent=1), "utf-8")


def _load(
    run: Run, data: PreparedData, tokenizer: Any, head: Head | None, gang: Gang | None
) -> tuple[Learner, BaseIdentity]:
    """The base model with a fresh adapter, and what identifies the base once hashed. Raises TrainingFailed."""
    order, spec = run.order, run.spec
    precision = choose_precision(order.device, spec.training.dtype, family := family_of(spec.base_model, spec.revision))
    if said := _about_fp16(spec, precision, family, on_gpu=run.on_gpu):
        run.note("precision", said)

    def load() -> Any:
        run.phase(f"loads {portable_name(spec.base_model)} for {order.method.value}")
        base = base_of(order, precision, head)
        if gang is None:
            run.tell(Planned(job_id=order.job_id, base=bytes_of_base(base)))
        return add_adapter(base, spec, order.method)

    model = load() if gang is None else gang.adapted(load)
    # once all files are here: loading may have fetched them from the hub
    identity = BaseIdentity(spec.base_model, spec.revision, Path(order.cache_dir))
    if order.init_from is not None:
        _begin_from(run, model, data, order.init_from)
    compute_in(model, precision)
    compares = order.init_from is not None and run.kind.from_ancestor
    started = [p.detach().cpu().clone() for p in model.parameters() if p.requires_grad] if compares else None
    return Learner(model=model, tokenizer=tokenizer, precision=precision, started=started), identity


def _begin_from(run: Run, model: Any, data: PreparedData, ancestor: Ancestor) -> None:
    """Put a stored adapter's weights in place of the fresh ones. Raises TrainingFailed if they do not fit."""
    folder = Path(ancestor.path)
    if (differing := run.kind.misfit(data, folder)) is not None:
        where = f"the rows and {ancestor.name} (job {ancestor.job_id}) differ in {differing}"
        raise TrainingFailed(Reason.BAD_DATA, f"lora.init_from: {where}")
    load_stored(model, folder / WEIGHTS)
    run.note("adapter", f"begins from the adapter of {ancestor.name} (job {ancestor.job_id})")


def _about_fp16(spec: JobSpec, precision: Precision, family: str, *, on_gpu: bool) -> str | None:
    """A warning if float16 and the model do not go together; else None."""
    if not on_gpu or not overflows_fp16(family):
        return None
    if precision.amp == "fp16":
        return f"training.dtype: {family} overflows float16; float32, or a card with bfloat16, is safer"
    if precision.amp is None and spec.training.dtype == "auto":
        return f"{family} overflows float16, and this card has no bfloat16: it trains in float32, slower"
    return None


_AT_ONCE = 2**22
"""Numbers of a parameter that are summed at a time: a copy of all of them in double precision might not fit."""


def _marks(model: Any) -> list[tuple[float, float]]:
    """The sum and the norm of each part of the trained weights: they differ as soon as a weight has changed."""
    trained = (parameter.detach() for parameter in model.parameters() if parameter.requires_grad)
    parts = (part.double() for weights in trained for part in weights.reshape(-1).split(_AT_ONCE))
    return [(float(part.sum()), float(part.norm())) for part in parts]


def check_finite(model: Any) -> None:
    """A training may diverge in its last steps, after the last loss was logged. Raises TrainingFailed."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise TrainingFailed(Reason.DIVERGED, f"the trained weights are not finite ({name})")


def _resolved(run: Run, arguments: TrainingArguments) -> dict[str, Any]:
    """The job as it ran: the spec, what memory changed in it, the method used, and transformers' arguments."""
    order = run.order
    taken = {k: v for k, v in arguments.to_dict().items() if isinstance(v, (str, int, float, bool, type(None)))}
    return {
        "spec": order.spec.model_dump(mode="json"),
        "adjustment": run.adjustment.as_json(),
        "method": order.method.value,
        "device": order.device,
        "init_from": order.init_from.lineage() if order.init_from else None,
        "torch": torch.__version__,
        "training_arguments": taken,
    }


def _evaluate(run: Run, task: EvaluationTask, benchmarks: Any, callbacks: Callbacks) -> Evaluation:
    """`benchmarks`: from `find_tasks`."""
    most, rows = run.spec.evaluation.max_rows, task.data.held_out.rows.examples
    rows = rows if most is None else min(rows, most)
    work = f"{rows} held-out row{'s' * (rows != 1)}"
    if answers := run.kind.answers(run.spec, task.data):
        work += f", with {answers} answer{'s' * (answers != 1)} of at most {run.spec.evaluation.max_new_tokens} tokens"
    progress = callbacks.teller.evaluating(_on(run, task, work))
    evaluation = run.kind.evaluate(replace(task, progress=progress))
    if (earlier := evaluation.base_measured) is not None:
        run.note(
            "evaluation",
            f"the base's figures are those of job {earlier.job_id}, measured here on the same rows "
            f"on {earlier.at:%Y-%m-%d}; {earlier.checked} of the rows were measured again and are equal",
        )
    callbacks.teller.tell_held_out(evaluation)
    if benchmarks is None:
        return evaluation
    run.note("evaluation", f"scoring base and tuned on {', '.join(run.spec.evaluation.lm_eval)} of lm_eval")
    return replace(evaluation, benchmarks=score_tasks(task.learner, run.spec, benchmarks, run.check_stop))


def _evaluate_final(run: Run, task: EvaluationTask, callbacks: Callbacks) -> Evaluation | None:
    """Evaluate on the final rows, only for the report's file: neither log nor database gets a figure from it."""
    if (final := task.data.of_final) is None:
        return None
    progress = callbacks.teller.evaluating(_on(run, task, "the final rows"), final=True)
    return run.kind.evaluate(replace(task, data=final, progress=progress))


def _on(run: Run, task: EvaluationTask, work: str) -> list[str]:
    """What is measured, one after the other."""
    return [f"{model} on {work}" for model in run.kind.measured(task.learner)]


def _checks(run: Run, learner: Learner) -> CheckCache:
    """Ask this box what it found out about concatenated rows on this base."""
    order, spec = run.order, run.spec
    files = sorted(traits_of(spec.base_model, spec.revision))
    how = [order.method.value, learner.precision, spec.training.attn_implementation, order.parallel.value]
    how += [order.device, order.device_name]
    return CheckCache(folder=Path(order.cache_dir) / "tried", about=[files, *how])


def _course(run: Run, learner: Learner, callbacks: Callbacks, arguments: TrainingArguments) -> dict[str, Any]:
    """What happened in the training, as the report has it (`build_report`)."""
    order, asked, peaks = run.order, run.order.spec.training, run.gauge.look()
    recorder, best = callbacks.recorder, callbacks.best
    # on several cards the measured peak does not cover the whole job
    measured_on = f" on {order.node}, the first of {len(order.ranks)} cards" if order.ranks else ""
    recomputes = run.spec.training.gradient_checkpointing
    return {
        "steps": recorder.steps,
        "resumed_from_step": recorder.first_step or None,
        "stopped_early_at_step": best.stopped_early,
        "kept_step": best.kept_step,
        "epochs": asked.num_train_epochs,
        "seconds": recorder.seconds,
        "tokens": recorder.tokens,
        "tokens_per_second": recorder.tokens_per_second,
        "peak_memory_bytes": peaks.reserved,
        "peak_memory_kind": run.gauge.kind + measured_on,
        "peak_allocated_bytes": peaks.allocated,
        "peak_process_bytes": peaks.process,
        "vram_planned": order.vram_planned,
        "vram_reserved": order.vram_reserved,
        "learning_rate": asked.learning_rate,
        "optim": arguments.optim.value,
        "per_device_train_batch_size": arguments.per_device_train_batch_size // run.cards,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "per_device_eval_batch_size": arguments.per_device_eval_batch_size,
        "adjustment": run.adjustment.as_json(),
        "changes": run.changes,
        "asked": {
            "per_device_train_batch_size": asked.per_device_train_batch_size,
            "gradient_accumulation_steps": asked.gradient_accumulation_steps,
            "gradient_checkpointing": asked.gradient_checkpointing,
            "per_device_eval_batch_size": order.spec.evaluation.per_device_eval_batch_size,
        },
        "gradient_checkpointing": arguments.activation_checkpointing if recomputes is None else recomputes,
        "precision": str(learner.precision.base).removeprefix("torch."),
        "device": order.device,
        "threads": torch.get_num_threads(),
        "cards": run.cards,
        "parallel": order.parallel.value,
        "losses": recorder.train_losses,
        "eval_losses": recorder.eval_losses,
    }
