"""The number format of the base's weights, as an Axolotl file gives it."""

from __future__ import annotations

from typing import Any

from .translation import Draft, short

BASE_KEYS = ("peft", "model_quantization_config")
"""Keys under which a backend and a number format of the base's weights may be named."""

_FOUR_BIT = ("nf4", "int4")


def names_four_bit(theirs: dict[str, Any]) -> bool:
    """Whether one of BASE_KEYS brings the base to 4 bit: Axolotl then trains QLoRA, whatever `adapter` says."""
    said = [theirs[key] for key in BASE_KEYS if isinstance(theirs.get(key), dict)]
    return any(value.get("weight_dtype") in _FOUR_BIT for value in said)


def base_format(draft: Draft, key: str, value: Any) -> None:
    """The base's number format (here four bits are always NF4), and LoftQ's initialization."""
    known = {"backend", "weight_dtype", "group_size", "loftq_config"}
    if not isinstance(value, dict) or value.keys() - known or value.get("weight_dtype") not in (None, *_FOUR_BIT):
        draft.leave(key, f"{short(value)}: the base is in 16 bit (lora) or NF4 (qlora)")
        return
    if loftq := value.get("loftq_config"):
        draft.put(key, "lora.init_lora_weights", "loftq")
        if loftq != {"loftq_bits": 4}:
            draft.differ(key, f"{short(loftq)}: LoftQ begins from NF4, in 4 bit")
    if "weight_dtype" in value:
        draft.put(key, "method", "qlora")
        if value != {"backend": "bnb", "weight_dtype": "nf4"}:
            draft.differ(key, f"{short(value)}: NF4 of bitsandbytes with double quantization is used")
    elif not loftq:
        draft.skip(key)


def nf4(draft: Draft, key: str, value: Any) -> None:
    """NF4 with its scales quantized again, in both tools."""
    ours = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if isinstance(value, dict) and all(ours.get(name) == there for name, there in value.items()):
        draft.skip(key)
    else:
        draft.leave(key, f"{short(value)}: NF4 with double quantization is used")
