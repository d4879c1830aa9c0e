"""The held-out loss in mid-training: a batch at a time, so that others need not wait for all of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import TrainingArguments

from loractl.worker.data.tokens import TokenRow

from .order import by_length


def held_out_batches(rows: Sequence[TokenRow], args: TrainingArguments) -> list[list[TokenRow]]:
    """Batches of the rows, in the order in which transformers' Trainer evaluates them."""
    order, size = list(range(len(rows))), args.per_device_eval_batch_size
    if args.train_sampling_strategy == "group_by_length":
        lengths = [len(row.input_ids) for row in rows]
        order = by_length(lengths, size, torch.Generator().manual_seed(args.data_seed))
    return [[rows[n] for n in order[at : at + size]] for at in range(0, len(order), size)]


def mean_loss(batches: Sequence[Sequence[TokenRow]], losses: Sequence[float]) -> float:
    """The mean over rows, each of which counts with the mean loss of its batch, as transformers' Trainer tells it."""
    pairs = zip(batches, losses, strict=True)
    return float(np.concatenate([np.full(len(batch), loss, dtype=np.float32) for batch, loss in pairs]).mean())
