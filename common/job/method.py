"""How an adapter is trained."""

from __future__ import annotations

import enum


class Method(enum.StrEnum):
    """The `method` of a job file."""

    AUTO = "auto"  # LoRA where the device holds it, else QLoRA
    LORA = "lora"  # base weights in 16 or 32 bit
    QLORA = "qlora"  # base weights in NF4 with double quantisation
