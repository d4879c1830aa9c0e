"""Where a step uses a card's kernels: fewer of them, which move fewer bytes, and round differently than a CPU's."""

from __future__ import annotations

from typing import Any

PLACES = ("cuda",)
"""Kinds of devices that use them. A CPU's bits are promised, and it would gain nothing."""


def is_on_card(x: Any) -> bool:
    """Whether a tensor, or a model, is on such a device."""
    return x.device.type in PLACES
