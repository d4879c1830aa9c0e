"""The measured peak of a training's memory."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes at the highest point, and what they count."""

    bytes: int
    kind: str


def peak_memory(device: str) -> Peak:
    """On CUDA what the allocator reserved at most; on a CPU the process's largest resident set."""
    if device == "cuda":
        return Peak(bytes=torch.cuda.max_memory_reserved(), kind="CUDA memory reserved")
    return Peak(bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, kind="resident set of the process")
