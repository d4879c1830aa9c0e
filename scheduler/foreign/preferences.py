"""Training on pairs: the losses of other tools, and what they do with rows of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loractl.common.job.sections import LOSSES, REFERENCE_FREE

from .translation import Draft, set_key, short, unset_key

AXOLOTL_RL = ("dpo", "ipo", "orpo", "simpo")
"""Values of Axolotl's `rl` that learn from pairs."""

_OF_DPO = tuple(name for name in LOSSES if name not in REFERENCE_FREE)
"""Losses that TRL's DPOTrainer and loractl have."""

_SAME_RESULT = {
    "precompute_ref_log_probs", "dpo_padding_free", "dpo_use_liger_kernel", "dpo_use_logits_to_keep",
    "dpo_generate_during_eval", "rl_adapter_ref_model", "max_prompt_len",
}  # fmt: skip
"""Keys of Axolotl that change how the loss is computed, or nothing at all."""


def is_of_pairs(draft: Draft) -> bool:
    """Whether the job learns from pairs."""
    return draft.job.get("task_type") == "preference"


def axolotl_loss(draft: Draft, theirs: Mapping[str, Any]) -> None:
    """Carry `rl` and its settings, which Axolotl gives to TRL's trainers."""
    kind = str(theirs["rl"]).lower()
    draft.put("rl", "task_type", "preference")
    _without_dropout(draft, "lora_dropout")
    _axolotl_beta(draft, theirs)
    if kind == "dpo":
        _axolotl_dpo(draft, theirs)
    elif kind == "simpo":
        _axolotl_simpo(draft, theirs)
    else:
        set_key(draft.job, "preference.loss_type", kind)
    if theirs.get("dpo_use_weighting"):
        draft.leave(
            "dpo_use_weighting", "true: Axolotl weights pairs by how likely they are; in loractl all count the same"
        )
    unused = {"simpo_gamma", "cpo_alpha", "dpo_label_smoothing", "dpo_use_weighting", "rpo_alpha"}
    for key in sorted((_SAME_RESULT | unused) & theirs.keys() - {*draft.carried, *draft.left_out}):
        draft.skip(key)


def _axolotl_beta(draft: Draft, theirs: Mapping[str, Any]) -> None:
    told = theirs["trl"] if isinstance(theirs.get("trl"), dict) else {}
    betas = {"trl": told.get("beta"), **{key: theirs.get(key) for key in ("rl_beta", "orpo_alpha", "dpo_beta")}}
    known = [key for key, value in betas.items() if value is not None]
    for key in known[:1]:
        draft.put(key, "preference.beta", betas[key])
    for key in known[1:]:
        draft.skip(key)
    if others := sorted(map(str, told.keys() - {"beta"})):
        draft.leave("trl", f"{', '.join(others)}: loractl has no such setting")


def _axolotl_dpo(draft: Draft, theirs: Mapping[str, Any]) -> None:
    """DPO's losses. TRL's label_smoothing applies only to robust, and without it robust is sigmoid."""
    given, smoothing = theirs.get("dpo_loss_type", []), theirs.get("dpo_label_smoothing")
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    if unknown := [name for name in names if name not in _OF_DPO]:
        what = f"{', '.join(unknown)}: loractl has {', '.join(_OF_DPO)}, and uses sigmoid"
        draft.leave("dpo_loss_type", what)
        if "dpo_loss_weights" in theirs:
            draft.leave("dpo_loss_weights", "belong to losses that are not carried")
        return
    if "robust" in names and smoothing:
        draft.put("dpo_label_smoothing", "preference.label_smoothing", smoothing)
    names = [name if smoothing or name != "robust" else "sigmoid" for name in names]
    if names:
        draft.put("dpo_loss_type", "preference.loss_type", names[0] if len(names) == 1 else names)
    weights = theirs.get("dpo_loss_weights")
    if isinstance(weights, list) and len(weights) == len(names):
        draft.put("dpo_loss_weights", "preference.loss_weights", weights)
    elif weights is not None:
        draft.leave("dpo_loss_weights", f"{short(weights)}: is not a weight for each loss")
    if not names and theirs.get("rpo_alpha"):
        _add_answers(draft, "rpo_alpha", "sigmoid", theirs["rpo_alpha"])


def _axolotl_simpo(draft: Draft, theirs: Mapping[str, Any]) -> None:
    """TRL's CPOTrainer, which also trains on the chosen answers unless cpo_alpha is 0."""
    if "simpo_gamma" in theirs:
        draft.put("simpo_gamma", "preference.simpo_gamma", theirs["simpo_gamma"])
    set_key(draft.job, "preference.loss_type", "simpo")
    if "cpo_alpha" not in theirs:
        set_key(draft.job, "preference.loss_type", ["simpo", "sft"])
        draft.filled_in["preference.loss_type"] = ["simpo", "sft"]
    elif theirs["cpo_alpha"]:
        _add_answers(draft, "cpo_alpha", "simpo", theirs["cpo_alpha"])


def factory_loss(draft: Draft, theirs: Mapping[str, Any]) -> None:
    """Carry the settings of LLaMA-Factory's `stage: dpo`."""
    draft.put("stage", "task_type", "preference")
    draft.not_needed.remove("stage")
    _without_dropout(draft, "lora_dropout")
    for key in {"packing", "neat_packing"} & theirs.keys():  # pairs are never packed there
        unset_key(draft.job, "training.packing")
        del draft.carried[key]
        draft.skip(key)
    loss, share = theirs.get("pref_loss", "sigmoid"), theirs.get("pref_ftx")
    if loss not in ("sigmoid", "hinge", "ipo", "orpo", "simpo"):
        draft.leave("pref_loss", f"{short(loss)}: loractl has no such loss for pairs, and uses sigmoid")
        loss = "sigmoid"
    elif "pref_loss" in theirs:
        draft.put("pref_loss", "preference.loss_type", loss)
    if "pref_beta" in theirs:
        draft.put("pref_beta", "preference.beta", theirs["pref_beta"])
    if loss == "orpo":
        what = "LLaMA-Factory's loss of the chosen answers leaves the prompt out; loractl, like TRL, includes it"
        draft.differ("pref_loss", f"orpo: {what}")
    if share and loss == "orpo":
        draft.leave("pref_ftx", f"{short(share)}: orpo has its own term for the chosen answers")
    elif share:
        _add_answers(draft, "pref_ftx", loss, share)
        what = "LLaMA-Factory takes the mean of each chosen answer, loractl the mean of all chosen tokens of a step"
        draft.differ("pref_ftx", f"{short(share)}: {what}")
    if "simpo_gamma" in theirs and loss == "simpo":
        draft.put("simpo_gamma", "preference.simpo_gamma", theirs["simpo_gamma"])
    for key in sorted(_FACTORY_REASONS.keys() & theirs.keys()):
        if theirs[key]:
            draft.leave(key, f"{short(theirs[key])}: {_FACTORY_REASONS[key]}")
    for key in sorted(({"pref_ftx", "simpo_gamma"} | _FACTORY_REASONS.keys()) & theirs.keys()):
        if key not in draft.carried and key not in draft.left_out:
            draft.skip(key)


_FACTORY_REASONS = {
    "dpo_label_smoothing": "smooths DPO's loss (cDPO); preference.label_smoothing belongs to another one, robust",
    "pref_bco_weight": "loractl has no such loss for pairs",
    "ld_alpha": "all tokens of an answer count the same",
    "ref_model": "answers are compared with the base without the adapter, or with the adapter of lora.init_from",
    "ref_model_adapters": "answers are compared with the base without the adapter, or with that of lora.init_from",
    "ref_model_quantization_bit": "answers are compared with the base in the number format of the training",
}


def _add_answers(draft: Draft, theirs: str, loss: str, weight: Any) -> None:
    """Add a weighted loss of the chosen answers to the loss of the pairs."""
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        draft.leave(theirs, f"{short(weight)}: is not a weight")
        return
    set_key(draft.job, "preference.loss_type", [loss, "sft"])
    draft.put(theirs, "preference.loss_weights", [1.0, weight])


def _without_dropout(draft: Draft, key: str) -> None:
    """Both tools switch dropout off for pairs, whatever the file says."""
    if key in draft.carried:
        unset_key(draft.job, "lora.lora_dropout")
        del draft.carried[key]
        draft.skip(key)
