"""transformers' training arguments, from a job's spec."""

from __future__ import annotations

import importlib.util
import os

from transformers import TrainingArguments

from loractl.common.job.sections import TrainingSpec
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.memory.step import checkpoints_activations
from loractl.common.memory.weights import optimizer_name
from loractl.worker.base.arithmetic import Precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.protocol.messages import Start


def check_trackers(spec: JobSpec) -> None:
    """Refuse a training.report_to that this worker can't serve. Raises TrainingFailed(bad_spec)."""
    for name in spec.training.report_to:
        if importlib.util.find_spec(name) is None:
            raise TrainingFailed(Reason.BAD_SPEC, f"training.report_to: the package {name} is not on this worker")
    if "wandb" in spec.training.report_to and not {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys():
        what = "wandb needs its owner's account: WANDB_API_KEY, or WANDB_MODE=offline"
        raise TrainingFailed(Reason.BAD_SPEC, f"training.report_to: {what} is not set on this worker")


PROJECT_NAMES = ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME")
"""Variables by which transformers' callbacks learn the project."""


def name_project(spec: JobSpec) -> None:
    """Tell the trackers of this process the job's project; without one, what the worker's owner has set holds."""
    if project := spec.training.tracker.project:
        os.environ.update(dict.fromkeys(PROJECT_NAMES, project))


SAME_NAME = (
    "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon",
    "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "label_smoothing_factor",
    "neftune_noise_alpha", "torch_compile", "seed", "logging_steps", "save_steps", "eval_steps",
)  # fmt: skip
"""Keys of the spec's training section that transformers takes unchanged."""


def training_arguments(
    order: Start, spec: JobSpec, precision: Precision, begun_with: str | None = None
) -> TrainingArguments:
    """transformers' arguments for a job: the spec's keys under their own names, and what depends on the device.

    `spec` is the order's, adjusted to the memory. `begun_with`: the optimizer with which it began elsewhere.
    """
    t = spec.training
    on_gpu = order.device == "cuda"
    recomputed = checkpoints_activations(spec, on_gpu=on_gpu)
    return TrainingArguments(
        **{name: getattr(t, name) for name in SAME_NAME} | _divided(order, t),
        output_dir=order.checkpoint_dir,
        num_train_epochs=t.num_train_epochs or 1,  # not checked when max_steps is set
        max_steps=t.max_steps or -1,
        per_device_eval_batch_size=spec.evaluation.per_device_eval_batch_size,
        activation_checkpointing=recomputed > 0,
        activation_checkpointing_kwargs={"use_reentrant": False, "every_n_layers": recomputed or 1},
        warmup_steps=t.warmup_steps if t.warmup_steps < 1 else int(t.warmup_steps),
        lr_scheduler_kwargs=t.lr_scheduler_kwargs or None,
        optim=begun_with or optimizer_name(order.spec, order.method, on_gpu=on_gpu),
        bf16=precision.amp == "bf16",
        fp16=precision.amp == "fp16",
        use_cpu=not on_gpu,
        data_seed=t.seed,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would show the last good loss instead of a NaN
        save_strategy="steps",
        save_total_limit=2,
        eval_strategy="steps" if t.eval_steps else "no",
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[*t.report_to],
        run_name=t.tracker.run_name or f"{order.spec.name}-{order.job_id}",
        **({"project": t.tracker.project} if t.tracker.project else {}),  # trackio's
        disable_tqdm=True,
    )


def _divided(order: Start, training: TrainingSpec) -> dict[str, int]:
    """Rows at once over all cards, and how often: a step learns from the same rows as on one card."""
    if not order.ranks:
        return {}
    rows, pieces = training.rows_a_card(len(order.ranks))
    return {"per_device_train_batch_size": rows * len(order.ranks), "gradient_accumulation_steps": pieces}
