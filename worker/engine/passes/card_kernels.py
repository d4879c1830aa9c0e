"""Where a step goes a card's way: in fewer kernels that move fewer bytes, and round otherwise than a processor's."""

from __future__ import annotations

from typing import Any

PLACES = ("cuda",)
"""Kinds of devices that go it. A processor's bits are promised, and it gains nothing."""


def is_on_card(x: Any) -> bool:
    """Of a tensor, or of a model."""
    return x.device.type in PLACES
