"""The held-out loss in mid-training: a batch at a time, so that others need not wait for all of it."""

from __future__ import annotations

from collections.abc import Sequence

from loractl.worker.data.tokens import TokenRow

from .loss import Loss


def held_out_batches(rows: Sequence[TokenRow], size: int) -> list[list[TokenRow]]:
    """Batches of the rows, the longest first, as the report's evaluation has them."""
    longest_first = sorted(rows, key=lambda row: -len(row.input_ids))
    return [longest_first[at : at + size] for at in range(0, len(rows), size)]


def mean_loss(loss: Loss, batches: Sequence[Sequence[TokenRow]], sums: Sequence[float]) -> float:
    """The loss per learned token (of a classifier: per row) over all rows, as the report measures it: no matter how
    large the batches are. `sums`: each batch's summed loss, in nats."""
    return sum(sums) / sum(loss.count(batch) for batch in batches)
