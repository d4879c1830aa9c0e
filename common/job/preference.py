"""The job file's section on how to learn from pairs. Keys are TRL's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from .sections import Section, one_or_list

LOSSES = ("sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "sft")


def _losses(value: Any) -> str | list[str]:
    return one_or_list(value, "loss", LOSSES, LOSSES, "a loss like sigmoid, or a list like [sigmoid, sft]")


ALONE = frozenset({"orpo"})
"""Losses that include their own term for the chosen answers."""

REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""Losses that need no reference: they only compare the two answers with each other."""

SMOOTHED = frozenset({"robust", "simpo"})
"""Losses that allow for mislabelled pairs."""


class PreferenceSpec(Section):
    """The loss of pairs; names and meaning are those of TRL's DPOConfig, CPOConfig and ORPOConfig."""

    loss_type: Annotated[str | list[str], BeforeValidator(_losses)] = "sigmoid"
    """sigmoid (DPO, arXiv:2305.18290), ipo (2310.12036), hinge (2305.10425), robust (2403.00409), simpo (2405.14734),
    orpo (2403.07691); or several, as [sigmoid, sft], where sft is the loss of the chosen answers."""
    loss_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """The weight of each of several losses; null: 1 each. A loss that should not count is left out of loss_type."""
    beta: float = Field(0.1, gt=0)
    """How far the adapter may go from the base; ipo's tau, the scale of simpo's rewards, the weight of orpo's odds
    ratio."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of mislabelled pairs, for robust and simpo."""
    simpo_gamma: float = Field(0.5, ge=0)
    """simpo's target margin between the rewards of the chosen and the rejected answer."""

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that are added up."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each."""
        return (1.0,) * len(self.losses) if self.loss_weights is None else tuple(self.loss_weights)

    @property
    def has_reference(self) -> bool:
        """Whether the base's own log-probabilities are needed."""
        return not REFERENCE_FREE & {*self.losses}

    @property
    def answer_weight(self) -> float:
        """The weight of the term that learns the chosen answers, token by token; 0: there is none."""
        weights = dict(zip(self.losses, self.weights, strict=True))
        return weights.get("sft", weights.get("orpo", 0.0))

    @property
    def learns_prompts(self) -> bool:
        """Whether the term for the chosen answers learns the text before them as well, as orpo's does."""
        return "orpo" in self.losses

    @model_validator(mode="after")
    def _one_weight_each(self) -> PreferenceSpec:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} for {len(self.losses)} of loss_type")
        return self
