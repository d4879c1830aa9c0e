"""The job's spec: the whole job file, and which of its keys go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationInfo, model_validator

from loractl.common.verdict import MIN_JUDGED

from .kinds import TaskKind, kind_of
from .method import Method, permitted_methods
from .names import REVISION
from .sections import (
    AS_WRITTEN,
    PLAIN,
    AncestorJob,
    ChannelName,
    DatasetSpec,
    Duration,
    EvaluationSpec,
    LoraSpec,
    Methods,
    Name,
    Predecessors,
    PreferenceSpec,
    Printable,
    PromptTemplate,
    ResourcesSpec,
    Section,
    TaskType,
    TrackerSpec,
    TrainingSpec,
    is_set,
)


class JobSpec(Section):
    """One fine-tune, complete and checked."""

    name: Name
    """Letters, digits, '.', '_' and '-', at most 63, a letter or digit first. Several jobs may have one name; numbers
    differ."""
    base_model: Printable = Field(min_length=1)
    """A hub id, or a folder (relative to the job file) with safetensors or one GGUF file, at the same absolute path on
    every box. Weights quantized before (GPTQ, AWQ, FP8) are refused: qlora quantizes the original. A GGUF base takes
    lora alone."""
    revision: Annotated[str, Field(pattern=REVISION)] | None = None
    """Branch, tag or commit of a base_model on the hub; null: its main branch when the job runs."""
    method: Methods = Method.AUTO
    """auto is [lora, qlora]: LoRA where a card has room for it now, else QLoRA. A list is your own order."""
    task_type: TaskType = TaskType.CAUSAL_LM
    """CAUSAL_LM: learn to answer. SEQ_CLS: learn to classify texts, with a head of its own. preference: learn which of
    two answers is preferred."""
    lora_patience: Duration | None = None
    """How long to wait for a card that holds LoRA before QLoRA will do, like 2h; null: take what fits first."""
    dataset: DatasetSpec
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    preference: PreferenceSpec = PreferenceSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    resources: ResourcesSpec = ResourcesSpec()
    after: Predecessors = Field(default_factory=list)
    """Start once these jobs have succeeded: their numbers, or names of jobs of the same submit."""
    after_any: bool = False
    """Whether any end of those jobs will do, such as a failure."""
    max_retries: int = Field(2, ge=0, le=100)
    """Further attempts after a failure that counts (the page of reasons says which do)."""
    priority: int = Field(0, ge=-1000, le=1000)
    """Higher goes first; each step counts for two weeks of waiting."""
    preemptible: bool | Literal["auto"] = "auto"
    """Whether it may be stopped for a waiting job: it saves a checkpoint and continues later. auto: for a much shorter
    one; true: also for one of higher priority; false: for none."""
    labels: dict[Annotated[Printable, Field(max_length=64)], Annotated[Printable, Field(max_length=256)]] = Field(
        default_factory=dict, max_length=32
    )
    """What loractl status --label finds; keys of at most 64 characters, values of 256."""
    notify: list[ChannelName] | None = Field(None, max_length=8)
    """Channels of the lab to notify when it ends or is held, by name; me: the user's own. null: the user's setting."""
    publish: bool = True
    """Whether its adapter may be pushed to a hub. false also holds for what is made from the adapter."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, value: Any) -> Any:
        known = isinstance(value, dict) and value.get("task_type") in list(TaskType)
        return kind_of(value["task_type"]).defaults(value) if known else value

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> JobSpec:
        # also in a stored spec: it can't be trained
        wrong = [*_around_plain_rows(self), *_undefined(self.evaluation), *self.kind.unfit(self)]
        if info.context == AS_WRITTEN:
            wrong += [*self.kind.idle(self), *_said_twice_or_never(self), *_without_what_they_need(self)]
        if wrong:
            raise ValueError("\n".join(wrong))  # "key: sentence" each, so that the file's line can be named
        return self

    @property
    def kind(self) -> TaskKind:
        """What it learns to do."""
        return kind_of(self.task_type)

    def data_sets(self) -> dict[str, str]:
        """The data sets that the job names, by what they are for: path, more.0 and so on, eval_path, final_path,
        regression."""
        named = {
            "path": self.dataset.path,
            **{f"more.{number}": source.path for number, source in enumerate(self.dataset.more)},
            "eval_path": self.dataset.eval_path,
            "final_path": self.dataset.final_path,
            "regression": self.evaluation.regression,
        }
        return {key: text for key, text in named.items() if text is not None}

    def with_data_sets(self, places: Mapping[str, str]) -> JobSpec:
        """The same job with some of its data sets elsewhere, by the names of `data_sets`."""
        named = {**self.data_sets(), **places}
        more = [
            source.model_copy(update={"path": named[f"more.{number}"]})
            for number, source in enumerate(self.dataset.more)
        ]
        dataset = {"more": more, **{key: named.get(key) for key in ("path", "eval_path", "final_path")}}
        evaluation = {"regression": named.get("regression")}
        return self.model_copy(
            update={
                "dataset": self.dataset.model_copy(update=dataset),
                "evaluation": self.evaluation.model_copy(update=evaluation),
            }
        )


def data_set_key(name: str) -> str:
    """The key of the job file that names this one of `data_sets`, like dataset.more.0."""
    return f"evaluation.{name}" if name == "regression" else f"dataset.{name}"


WITHOUT_EFFECT = frozenset({"resources.exclusive"})
"""Keys of earlier job files and stored specs that are still read, and change nothing any more."""


def spec_keys() -> list[str]:
    """Every key of the job file that has an effect, as a dotted path, sections left out."""
    return [key for key in _all_keys(JobSpec) if not key.endswith(".") and key not in WITHOUT_EFFECT]


def _around_plain_rows(spec: JobSpec) -> Iterator[str]:
    """ "key: sentence" for a template that would have no effect."""
    dataset = spec.dataset
    if dataset.template is not PromptTemplate.CHAT and dataset.format in PLAIN:
        yield f"dataset.template: rows of the format {dataset.format.value} are taken as they are; leave it out"


def _undefined(evaluation: EvaluationSpec) -> Iterator[str]:
    """ "key: sentence" for a measure that decides and is none."""
    names = [metric.name for metric in evaluation.own]
    if evaluation.decide_by is not None and evaluation.decide_by not in names:
        known = f"it defines {', '.join(names)}" if names else "it defines none, like {name: gsm8k, compare: number}"
        yield f"evaluation.decide_by: {evaluation.decide_by} is no measure that evaluation.metrics defines; {known}"


def _said_twice_or_never(spec: JobSpec) -> Iterator[str]:
    """ "key: sentence" for what two keys both say, or for what neither says."""
    dataset, training = spec.dataset, spec.training
    if dataset.eval_path and is_set(dataset, "test_size"):
        yield "dataset.test_size: dataset.eval_path already says what is held out; keep one of them"
    if dataset.eval_path is None and dataset.eval_split is not None:
        yield "dataset.eval_split: is for dataset.eval_path, and there is none; name one, or leave it out"
    if dataset.final_path and dataset.final_size:
        yield "dataset.final_size: dataset.final_path already says which rows are final; keep one of them"
    apart = (0.0 if dataset.eval_path else dataset.test_size or 0.0) + (dataset.final_size or 0.0)
    if dataset.final_size and apart >= 1:
        yield f"dataset.final_size: with dataset.test_size it is {apart:g}, which leaves no row to train on"
    if training.max_steps is None and training.num_train_epochs is None:
        yield "training.num_train_epochs: is null, and so is training.max_steps; one must say when to stop"
    if dataset.eval_path is None and dataset.test_size is None:
        yield "dataset.test_size: is null, and there is no dataset.eval_path; one must say what is held out"
    if training.max_steps and is_set(training, "num_train_epochs"):
        yield "training.num_train_epochs: training.max_steps already says when to stop; keep one of them"


def _without_what_they_need(spec: JobSpec) -> Iterator[str]:
    """ "key: sentence" for each key that has no effect, or can't have one, with the other keys."""
    training, methods = spec.training, permitted_methods(spec.method)
    if training.max_steps == 1 <= training.warmup_steps and training.lr_scheduler_type != "constant":
        yield "training.warmup_steps: the only step would have learning rate 0 and learn nothing; leave it out"
    if spec.lora_patience is not None and methods != (Method.LORA, Method.QLORA):
        yield "lora_patience: is for method auto or [lora, qlora]; other methods have nothing to wait for"
    if training.optim.startswith("paged") and Method.QLORA not in methods:
        yield "training.optim: paged optimizers are for method qlora or auto; use adamw_torch or adamw_8bit"
    for key in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(training, key) and training.eval_steps is None:
            yield f"training.{key}: needs training.eval_steps: without it nothing is evaluated during training"
    if training.tracker != TrackerSpec() and not {*training.report_to} - {"tensorboard"}:
        yield "training.tracker: names a run for wandb, mlflow or trackio; add one to training.report_to"
    asked = spec.evaluation
    if asked.decide_by in [metric.name for metric in asked.own] and asked.samples < MIN_JUDGED:
        few = f"{spec.evaluation.samples} answers (evaluation.samples) are too few to judge by"
        yield f"evaluation.decide_by: {few}; set {MIN_JUDGED} or more"
    default = EvaluationSpec.model_fields["lm_eval_limit"].default  # a resolved spec has it without any task
    if spec.evaluation.lm_eval_limit != default and not spec.evaluation.lm_eval:
        yield "evaluation.lm_eval_limit: evaluation.lm_eval names no task to limit"
    if training.packing and training.train_sampling_strategy == "group_by_length":
        yield "training.train_sampling_strategy: packed rows are all of one length; keep one of the two"
    if spec.lora.init_lora_weights == "loftq" and methods != (Method.QLORA,):
        yield "lora.init_lora_weights: loftq corrects NF4's errors; it is for method: qlora"
    if spec.after_any and not spec.after:
        yield "after_any: after names no job; name one, or leave it out"
    begun = spec.lora.init_from
    awaited = [str(one) for one in spec.after if isinstance(one, int)]  # a name is that of a stored adapter
    needed = begun.job if isinstance(begun, AncestorJob) else begun if begun in awaited else None
    if spec.after_any and needed is not None:
        said = "lora.init_from needs that job's adapter, which it has once it has succeeded"
        yield f"after_any: {said}; leave it out, or after as well if the adapter is stored"
    yield from _uneven(spec)
    if spec.lora.init_from is not None and spec.lora.init_lora_weights != "default":
        yield "lora.init_lora_weights: lora.init_from already says how A and B start; remove one of them"


def _uneven(spec: JobSpec) -> Iterator[str]:
    """ "key: sentence" for cards that can't share the job, or a way to share it without cards to share it."""
    cards, parallel, training = spec.resources.cards, spec.resources.parallel, spec.training
    if cards != "auto" and cards not in (even := training.even_cards):
        rows = f"the {training.effective_batch} rows of a step (per_device_train_batch_size x accumulation) evenly"
        yield f"resources.cards: {cards} can't share {rows}; these can: {', '.join(map(str, even))}"
    if cards == 1 and parallel != "auto":
        yield "resources.parallel: says how several cards divide a job, and resources.cards is 1; leave one of them out"
    if cards == "auto" and parallel == "data":
        yield "resources.parallel: data has the whole base on each card, so auto takes one; set resources.cards"


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        kinds = () if get_origin(kind) is list else (kind, *get_args(kind))  # a list of sections is one key
        inner = next((t for t in kinds if isinstance(t, type) and issubclass(t, BaseModel)), None)
        keys += _all_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys
