"""How an adapter is trained, and how several cards divide the work."""

from __future__ import annotations

import enum
from typing import Literal


class Method(enum.StrEnum):
    """The `method` of a job file."""

    AUTO = "auto"  # LoRA where the device holds it, else QLoRA
    LORA = "lora"  # base weights in 16 or 32 bit
    QLORA = "qlora"  # base weights in NF4 with double quantisation


Checkpointing = bool | Literal["half"]
"""The `training.gradient_checkpointing` of a job file: whether blocks are recomputed; "half": every second block."""

MOST_CARDS = 8
"""The most cards that a job may have: as many as one box has."""


class Parallel(enum.StrEnum):
    """How the cards of a job divide it."""

    NONE = "none"  # one card has all of it
    DATA = "data"  # each card has the whole base, and its part of each step's rows
    SHARDED = "sharded"  # the base is divided too, and gathered a block at a time
