"""The held-out loss in mid-training, which changes nothing of the steps after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import TrainingArguments

from loractl.worker.data.tokens import TokenRow

from .order import by_length


def held_out_loss(rows: Sequence[TokenRow], args: TrainingArguments, loss: Callable[[list[TokenRow]], float]) -> float:
    """The mean over rows, each of which counts with the mean loss of its batch, as transformers' Trainer tells it."""
    order, size = list(range(len(rows))), args.per_device_eval_batch_size
    if args.train_sampling_strategy == "group_by_length":
        lengths = [len(row.input_ids) for row in rows]
        order = by_length(lengths, size, torch.Generator().manual_seed(args.data_seed))
    batches = [[rows[n] for n in order[at : at + size]] for at in range(0, len(order), size)]
    losses = [np.full(len(batch), loss(batch), dtype=np.float32) for batch in batches]
    return float(np.concatenate(losses).mean())
