"""Learning from pairs which of two answers is preferred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loractl.common.job.preference import ALONE, REFERENCE_FREE, SMOOTHED, PreferenceSpec
from loractl.common.job.sections import DataFormat, Metric, TaskType

from .kind import Sections, TaskKind

PAIRS = (DataFormat.PREFERENCE, DataFormat.PREFERENCE_TEXT)
"""Formats of pairs. The first one accepts both and picks by the first row."""

MEASURED = (Metric.LOSS, Metric.PREFERENCES)
"""What can be measured of pairs."""

LEARNING_RATE = 1e-5
"""Rates that suit answers ruin pairs. TRL's scripts use 5e-6 for adapters, its trainer 1e-6 for full models."""


class Preferences(TaskKind):
    """Pairs: a prompt, an answer that was chosen, one that was rejected."""

    task = TaskType.PREFERENCE
    loss_of = "pair"
    halves = 2

    def defaults(self, written: dict[str, Any]) -> dict[str, Any]:
        """One format, a low learning rate, and no dropout, since the reference has none either."""
        value = dict(written)
        for name, own in (
            ("dataset", {"format": DataFormat.PREFERENCE}),
            ("lora", {"lora_dropout": 0.0}),
            ("training", {"learning_rate": LEARNING_RATE}),
            ("evaluation", {"metrics": list(MEASURED)}),
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
        if others := ", ".join(m.value for m in spec.evaluation.metrics if m not in MEASURED):
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

    def undivided(self, spec: Sections) -> str | None:
        if not spec.preference.answer_weight:
            return None
        return "sft and orpo take the mean over a micro-batch's answers, which several cards would divide"

    def idle(self, spec: Sections) -> Iterator[str]:
        gamma = PreferenceSpec.model_fields["simpo_gamma"].default
        if spec.preference.simpo_gamma != gamma and "simpo" not in spec.preference.losses:
            yield "preference.simpo_gamma: is for loss_type: simpo; leave it out"
