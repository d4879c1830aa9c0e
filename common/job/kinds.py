"""The kinds of training: what each means for the job file, for placement and for the plan. None needs a model here.

A job continues text (answers), names a text's label (classes), or learns which of two answers is preferred (pairs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from .sections import (
    ALONE,
    OF_PAIRS,
    REFERENCE_FREE,
    SMOOTHED,
    DataFormat,
    DatasetSpec,
    EvaluationSpec,
    LoraSpec,
    Metric,
    PreferenceSpec,
    ResourcesSpec,
    TaskType,
    TrainingSpec,
    is_set,
)


class Sections(Protocol):
    """The sections of a job file that a kind checks."""

    @property
    def dataset(self) -> DatasetSpec: ...

    @property
    def lora(self) -> LoraSpec: ...

    @property
    def training(self) -> TrainingSpec: ...

    @property
    def preference(self) -> PreferenceSpec: ...

    @property
    def evaluation(self) -> EvaluationSpec: ...

    @property
    def resources(self) -> ResourcesSpec: ...


class TaskKind:
    """What a job learns to do. Code asks the kind and never compares task names. To add one, write a module here and,
    for the parts that need a model, a class in worker/recipe/kinds.py."""

    task: TaskType
    peft = "CAUSAL_LM"
    """peft's word for what its adapter is added to."""
    padded: str | None = None
    """Why its rows need padding; None: they need none."""
    writes = True
    """Whether its adapter continues a text, so that `generate`, `chat` and `serve` can ask it."""
    base_draws = True
    """Whether the base's own dropout, if it has any, acts in training."""
    loss_of = "token"
    """What a loss is the mean of."""
    measured_from_start = False
    """Whether a loss is measured from the adapter that the job starts from."""
    halves = 1
    """How many texts of up to dataset.max_length tokens one row holds."""

    def defaults(self, written: dict[str, Any]) -> dict[str, Any]:
        """A job file with the defaults that differ for the kind."""
        return written

    def unfit(self, spec: Sections) -> Iterator[str]:
        """ "key: sentence" for each key that means nothing for the kind."""
        yield from ()

    def idle(self, spec: Sections) -> Iterator[str]:
        """Sentences, as of `unfit`, for keys of a job file that would have no effect; a stored spec may have them."""
        if spec.preference != PreferenceSpec():
            yield "preference: is for task_type: preference, which learns from pairs; leave it out"

    def loss_by(self, spec: Mapping[str, Any], begun_from: str | None) -> Any:
        """What decides which loss a job has: equal for jobs whose losses can be compared. `spec`: as it is stored.
        `begun_from`: sha256 of the adapter that it began from."""
        return None

    def planned_labels(self, known: int | None) -> int | None:
        """Outputs of a head of its own, where it has one. `known`: those that its data name, once they are read."""
        return None


OF_OTHERS = {
    DataFormat.CLASSIFICATION: "task_type: SEQ_CLS, which learns labels",
    DataFormat.PREFERENCE: "task_type: preference, which learns from pairs",
    DataFormat.PREFERENCE_TEXT: "task_type: preference, which learns from pairs",
}
"""Formats that contain no answer to learn."""


class Answers(TaskKind):
    """Answers of conversations and instructions, and plain text."""

    task = TaskType.CAUSAL_LM

    def unfit(self, spec: Sections) -> Iterator[str]:
        for format, kind in OF_OTHERS.items():
            if spec.dataset.format is format:
                yield f"dataset.format: {format.value} is for {kind}; set that, or take another format"
        if others := ", ".join(metric.value for metric in spec.evaluation.metrics if metric in OF_PAIRS):
            yield f"evaluation.metrics: {others} can't be measured of answers; task_type: preference learns from pairs"
        own = ", ".join(metric.name for metric in spec.evaluation.own)
        if own and spec.dataset.format is DataFormat.TEXT:
            yield f"evaluation.metrics: {own} can't be measured of plain text, which asks nothing; leave it out"


MEASURED_OF_CLASSES = (Metric.LOSS, Metric.LABELS)
"""What can be measured of a classifier, which generates nothing."""

UNREAD_LABELS = 100
"""A classifier's labels while its data have not been read: more than most have, and less than 10 MiB of head."""

HEADS = frozenset({"lm_head", "embed_out", "score", "classifier"})
"""Models' names for the layer after their last block."""


class Classes(TaskKind):
    """Labels of texts."""

    task = TaskType.SEQ_CLS
    peft = "SEQ_CLS"
    padded = "a classifier's head looks for a row's last token before the padding"
    writes = False
    loss_of = "row"

    def defaults(self, written: dict[str, Any]) -> dict[str, Any]:
        """One format, and nothing to generate."""
        value = {"evaluation": {}, **written}
        dataset, evaluation = value.get("dataset"), value["evaluation"]
        if isinstance(dataset, dict) and dataset.get("format", DataFormat.AUTO) == DataFormat.AUTO:
            value["dataset"] = {**dataset, "format": DataFormat.CLASSIFICATION}
        if isinstance(evaluation, dict):
            metrics = evaluation.get("metrics", list(MEASURED_OF_CLASSES))
            told = isinstance(metrics, list) and all(metric in list(MEASURED_OF_CLASSES) for metric in metrics)
            # the error for metrics that can't be measured names the task, not the samples that they would need
            value["evaluation"] = {"metrics": metrics, **({"samples": 0} if told else {}), **evaluation}
        return value

    def unfit(self, spec: Sections) -> Iterator[str]:
        dataset, evaluation = spec.dataset, spec.evaluation
        if dataset.format is not DataFormat.CLASSIFICATION:
            what = (
                "has no labels: SEQ_CLS reads classification, rows with text and label (dataset.columns renames yours)"
            )
            yield f"dataset.format: {dataset.format.value} {what}"
        if others := ", ".join(m.value for m in evaluation.metrics if m not in MEASURED_OF_CLASSES):
            yield f"evaluation.metrics: a classifier generates nothing: {others} can't be measured, loss and labels can"
        if evaluation.samples and is_set(evaluation, "samples"):
            yield "evaluation.samples: a classifier generates no answers; leave it out"
        if evaluation.regression is not None:
            yield "evaluation.regression: a classifier's head knows nothing but its labels; leave it out"
        if evaluation.lm_eval:
            yield "evaluation.lm_eval: a classifier generates no text, which these tasks need; leave it out"
        if spec.training.packing:
            yield "training.packing: a classifier's row is one text with one label; set packing: false"
        if named := ", ".join(name for name in spec.lora.modules_to_save if name.rpartition(".")[2] in HEADS):
            what = "a classifier has only its own head, which is trained in full and stored as it is"
            yield f"lora.modules_to_save: {named}: {what}; leave it out"

    def idle(self, spec: Sections) -> Iterator[str]:
        yield from super().idle(spec)
        if is_set(spec.evaluation, "max_new_tokens"):
            yield "evaluation.max_new_tokens: a classifier generates no answers; leave it out"

    def planned_labels(self, known: int | None) -> int | None:
        return known or UNREAD_LABELS


PAIRS = (DataFormat.PREFERENCE, DataFormat.PREFERENCE_TEXT)
"""Formats of pairs. The first one accepts both and picks by the first row."""

MEASURED_OF_PAIRS = (Metric.LOSS, Metric.PREFERENCES)
"""What can be measured of pairs."""

LEARNING_RATE = 1e-5
"""Rates that suit answers ruin pairs. TRL's scripts use 5e-6 for adapters, its trainer 1e-6 for full models."""


class Preferences(TaskKind):
    """Pairs: a prompt, an answer that was chosen, one that was rejected."""

    task = TaskType.PREFERENCE
    base_draws = False  # the reference is scored without
    loss_of = "pair"
    measured_from_start = True  # that is the reference
    halves = 2

    def defaults(self, written: dict[str, Any]) -> dict[str, Any]:
        """One format, a low learning rate, and no dropout, since the reference has none either."""
        value = dict(written)
        for name, own in (
            ("dataset", {"format": DataFormat.PREFERENCE}),
            ("lora", {"lora_dropout": 0.0}),
            ("training", {"learning_rate": LEARNING_RATE}),
            ("evaluation", {"metrics": list(MEASURED_OF_PAIRS)}),
        ):
            section = value.get(name, {})
            if isinstance(section, dict):
                value[name] = own | section
        if isinstance(dataset := value["dataset"], dict) and dataset["format"] == DataFormat.AUTO:
            value["dataset"] = {**dataset, "format": DataFormat.PREFERENCE}
        return value

    def loss_by(self, spec: Mapping[str, Any], begun_from: str | None) -> Any:
        """Its terms and their numbers, and what it is measured from."""
        asked = PreferenceSpec.model_construct(**(spec.get("preference") or {}))
        said = asked.model_dump() | {"loss_type": asked.losses, "loss_weights": asked.weights}  # however it is written
        reference = [spec.get("base_model"), spec.get("revision"), begun_from]
        return said, reference if asked.has_reference else None

    def unfit(self, spec: Sections) -> Iterator[str]:
        asked, training = spec.preference, spec.training
        if spec.dataset.format not in PAIRS:
            what = "has no pairs: preference reads rows with chosen and rejected (dataset.columns renames yours)"
            yield f"dataset.format: {spec.dataset.format.value} {what}"
        if others := ", ".join(m.value for m in spec.evaluation.metrics if m not in MEASURED_OF_PAIRS):
            yield f"evaluation.metrics: {others} can't be measured of pairs; loss and preferences can"
        if training.packing:
            yield "training.packing: a pair is one row already; set packing: false"
        if training.label_smoothing_factor:
            yield "training.label_smoothing_factor: smooths answers' tokens; pairs have preference.label_smoothing"
        if spec.evaluation.regression is not None:
            yield "evaluation.regression: pairs have no loss that other rows share; leave it out"
        names = asked.losses
        if len(names) > 1 and (alone := next((name for name in names if name in ALONE), None)):
            yield f"preference.loss_type: {alone} has its own term for the chosen answers; it can't be combined"
        if asked.label_smoothing and not SMOOTHED & {*names}:
            yield f"preference.label_smoothing: is for {' and '.join(sorted(SMOOTHED))}; set one, or leave it out"
        if "robust" in names and not asked.label_smoothing:
            yield "preference.label_smoothing: robust needs the share of pairs that are labelled wrongly, like 0.1"
        if len({name in REFERENCE_FREE for name in names if name != "sft"}) > 1:
            yield f"preference.loss_type: {', '.join(names)}: one compares with the base and one does not; take one"
        if names == ("sft",):
            yield "preference.loss_type: sft alone learns chosen answers; task_type: CAUSAL_LM does that"

    def idle(self, spec: Sections) -> Iterator[str]:
        gamma = PreferenceSpec.model_fields["simpo_gamma"].default
        if spec.preference.simpo_gamma != gamma and "simpo" not in spec.preference.losses:
            yield "preference.simpo_gamma: is for loss_type: simpo; leave it out"


ANSWERS = Answers()
"""The kind of a job that names none."""

_KINDS: dict[TaskType, TaskKind] = {kind.task: kind for kind in (ANSWERS, Classes(), Preferences())}


def kind_of(task: str | None) -> TaskKind:
    """The kind of a `task_type`. A stored spec older than the key lacks it: such jobs learn to answer. Raises
    ValueError for an unknown kind."""
    return ANSWERS if task is None else _KINDS[TaskType(task)]
