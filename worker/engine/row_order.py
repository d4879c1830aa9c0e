"""The order of a member's rows, epoch by epoch, and the windows of micro-batches for its steps.

The orders are those of transformers' Trainer for the same seed, so that a job file means the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import TrainingArguments

MEGA_BATCHES = 50
"""group_by_length sorts within at most this number of batches at a time (transformers' get_length_grouped_indices)."""


class RowOrder:
    """The order of a member's rows. It draws from the streams in use when an epoch begins."""

    def __init__(self, lengths: Sequence[int], args: TrainingArguments) -> None:
        self._lengths = lengths
        self._strategy = args.train_sampling_strategy
        self._seed = args.data_seed
        self._size, self._accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.rows = torch.empty(0, dtype=torch.int64)  # of the epoch that began last

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one epoch; the last may be short."""
        return math.ceil(len(self._lengths) / self._size)

    @property
    def windows(self) -> int:
        """Optimizer steps of one epoch; the last may have fewer micro-batches."""
        return math.ceil(self.micro_batches / self._accumulated)

    @property
    def redrawn(self) -> bool:
        """Whether an epoch's order follows from its number; else a checkpoint must hold it."""
        return self._strategy != "group_by_length"

    def begin(self, epoch: int) -> None:
        """Draw the order of an epoch."""
        torch.empty((), dtype=torch.int64).random_()  # torch's DataLoader draws a number here for its workers
        self.rows = self.draw(epoch)

    def draw(self, epoch: int) -> torch.Tensor:
        count = len(self._lengths)
        if self._strategy == "sequential":
            return torch.arange(count)
        if self._strategy == "random":
            return torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + epoch))
        return torch.tensor(by_length(self._lengths, self._size * self._accumulated))

    def window(self, number: int) -> list[list[int]]:
        """The rows of each micro-batch of an epoch's window."""
        micro = range(number * self._accumulated, min(self.micro_batches, (number + 1) * self._accumulated))
        return [self.rows[n * self._size : (n + 1) * self._size].tolist() for n in micro]


def by_length(lengths: Sequence[int], batch: int) -> list[int]:
    """Rows in random order, but with neighbours of similar length; the longest row comes first, to see early whether it
    fits."""
    large = (min(len(lengths) // (batch * 4), MEGA_BATCHES) or 1) * batch
    drawn = torch.randperm(len(lengths)).tolist()
    sorted_ones = [
        sorted(drawn[at : at + large], key=lambda row: lengths[row], reverse=True) for at in range(0, len(drawn), large)
    ]
    longest = max(range(len(sorted_ones)), key=lambda n: lengths[sorted_ones[n][0]])  # the first of several
    first, other = sorted_ones[0], sorted_ones[longest]
    first[0], other[0] = other[0], first[0]
    return [row for part in sorted_ones for row in part]
