"""What a process takes of a card besides torch's allocator: a CUDA context and its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTEXT_BYTES = 500 * 2**20
"""What a plan counts: 0.15 GiB (T4) to 0.5 GiB (A100, H100); the upper end."""


def context_excess(self_test: Mapping[str, Any] | None) -> int:
    """Bytes that a trainer's process takes of its card beyond its reservation, by the card's self-test: its context is
    larger than planned, or grows while kernels are loaded, when the allocator has its part already (allocator_room of
    worker/base/gauge.py)."""
    found = self_test or {}
    begun, after = found.get("context"), found.get("context_after") or found.get("context")
    return 0 if after is None else max(0, after - min(CONTEXT_BYTES, CONTEXT_BYTES if begun is None else begun))
