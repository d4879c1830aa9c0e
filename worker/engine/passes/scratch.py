"""Memory for large tensors that follow one another: fresh memory of their size costs more than a softmax."""

from __future__ import annotations

import torch


class Scratch:
    """Memory for fp32 numbers on a CPU. Each tensor overwrites the last."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, count: int, width: int) -> torch.Tensor:
        """Memory of shape (count, width), which the last tensor used."""
        if self._memory is None or len(self._memory) < count * width:
            self._memory = None  # before allocating more
            self._memory = torch.empty(count * width)
        return torch.empty(0).set_(self._memory.untyped_storage(), 0, (count, width))

    def leave(self) -> None:
        """Release the memory. Tensors still in use keep theirs."""
        self._memory = None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the last one, unchanged."""
        return self._memory is not None and tensor.data_ptr() == self._memory.data_ptr() and tensor.is_contiguous()
