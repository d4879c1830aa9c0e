"""A classifier's head: its labels and its first weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loractl.common.job.status import Reason

from .failure import TrainingFailed
from .source import configs_of, source_of

HEAD = "score"
"""transformers' name for the head of every decoder that classifies; peft trains and stores it under that name."""

INITIAL_SPREAD = 0.02
"""Standard deviation of a head's first weights if the model's config has no initializer_range: transformers' own."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The description of a classifier's head."""

    labels: tuple[str, ...]
    pad: int  # the padding token: the last token before the padding decides
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What transformers needs to know about it, as keys of the model's config."""
        return {**label_settings(self.labels), "pad_token_id": self.pad}


def label_settings(labels: Sequence[str]) -> dict[str, Any]:
    """Labels in the form that AutoModelForSequenceClassification.from_pretrained takes."""
    names = dict(enumerate(labels))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: n for n, name in names.items()}}


def check_no_head_yet(base_model: str, revision: str | None) -> None:
    """Refuse a classifier: its own head would be overwritten, and its labels differ. Raises TrainingFailed."""
    made_for = configs_of(base_model, source_of(base_model, revision))[0].get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in made_for):
        what = "is a classifier already, and its head would be lost: name the model that it was made from"
        raise TrainingFailed(Reason.BAD_SPEC, f"base_model {base_model} {what}")


def begin_head(model: Any, head: Head) -> None:
    """Fresh weights, drawn on the CPU from their own generator: the same on every device, and with every method.

    Raises TrainingFailed(bad_spec) for an encoder: its classifiers are built in another way.
    """
    layer = getattr(model, HEAD, None)
    if not isinstance(layer, torch.nn.Linear):
        what = f"task_type: SEQ_CLS is for decoders, and {type(model).__name__} has no head of theirs"
        raise TrainingFailed(Reason.BAD_SPEC, what)
    text = model.config.get_text_config()
    text.pad_token_id = head.pad
    drawn = torch.empty(layer.weight.shape, dtype=torch.float32)
    spread = getattr(text, "initializer_range", INITIAL_SPREAD)
    drawn.normal_(std=spread, generator=torch.Generator().manual_seed(head.seed))
    layer.weight.data.copy_(drawn)
