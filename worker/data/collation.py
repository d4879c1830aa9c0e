"""Rows as the tensors of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from .tokens import IGNORED, TokenRow


def inputs_of(row: TokenRow) -> dict[str, list[int]]:
    """A row as a data set's item, for `collate`."""
    if row.label is not None:
        return {"input_ids": row.input_ids, "label": [row.label]}
    return {"input_ids": row.input_ids, "labels": row.labels, "starts": list(row.starts)}


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors of shape (rows, longest row): input_ids, labels and attention_mask; for packed rows
    position_ids instead of the mask, restarting with every example and with the padding. A classifier's labels have the
    shape (rows,)."""
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(values: Callable[[dict[str, list[int]]], list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([(v := values(r)) + [fill] * (longest - len(v)) for r in rows])

    mask = padded(lambda r: [1] * len(r["input_ids"]), 0)
    if "label" in rows[0]:
        labels = torch.tensor([r["label"][0] for r in rows])
        return {"input_ids": padded(lambda r: r["input_ids"], pad), "labels": labels, "attention_mask": mask}
    batch = {"input_ids": padded(lambda r: r["input_ids"], pad), "labels": padded(lambda r: r["labels"], IGNORED)}
    if any(r.get("starts") for r in rows):
        return batch | {"position_ids": torch.tensor([_positions(r, longest) for r in rows])}
    return batch | {"attention_mask": mask}


def _positions(row: dict[str, list[int]], longest: int) -> list[int]:
    borders = sorted({0, *row.get("starts", ()), len(row["input_ids"]), longest})
    return [place for begin, end in itertools.pairwise(borders) for place in range(end - begin)]
