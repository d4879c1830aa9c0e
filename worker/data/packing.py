"""Packing: rows of several examples that can't see each other, so that little of a batch is padding.

transformers keeps packed examples apart if position ids restart and no attention mask is given
(masking_utils.find_packed_sequence_indices). An architecture with its own attention may not: `check_apart` tests the
model itself.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import evaluating
from loractl.worker.base.failure import TrainingFailed

from .prepared import PreparedData
from .token_rows import TokenRows, collate, inputs_of
from .tokens import IGNORED, TokenRow

APART_TOLERANCE = 0.01
"""Share of the largest logit that rounding may move; another example in sight moves far more."""


def packed(data: PreparedData, spec: JobSpec) -> PreparedData:
    """The data with packed rows, if the job asks for that."""
    if not spec.training.packing:
        return data
    return replace(data, packed=TokenRows.of(pack(data.train.rows, spec.dataset.max_length)))


def pack(rows: Sequence[TokenRow], max_length: int) -> list[TokenRow]:
    """Rows of at most `max_length` tokens, each made of whole examples: the longest first, each into the fullest row
    that has room (best fit decreasing). The first token of an example is never learned: no token precedes it. No two
    rows of one conversation are packed together: it would be learned twice in a step."""
    bins: list[list[TokenRow]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for row in sorted(rows, key=lambda row: (-len(row.input_ids), row.number)):
        place = bisect.bisect_left(room, (len(row.input_ids), -1))
        while place < len(room) and any(row.number == other.number for other in bins[room[place][1]]):
            place += 1
        if place == len(room):
            bins.append([])
            free, number = max_length, len(bins) - 1
        else:
            free, number = room.pop(place)
        bins[number].append(row)
        bisect.insort(room, (free - len(row.input_ids), number))
    return [_joined(examples) for examples in bins]


def check_apart(model: Any, rows: Sequence[TokenRow], pad: int) -> None:
    """Change the first example of a packed row: nothing of the second may change. Raises TrainingFailed(bad_spec)."""
    row = next((row for row in rows if row.starts), None)
    if row is None:
        return
    first = row.starts[0]
    end = row.starts[1] if len(row.starts) > 1 else len(row.input_ids)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    other = [(token + 1) % vocabulary for token in row.input_ids[:first]] + row.input_ids[first:]
    seen = []
    with evaluating(model):
        for ids in (row.input_ids, other):
            batch = collate([inputs_of(replace(row, input_ids=ids))], pad)
            del batch["labels"]
            moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
            seen.append(model(**moved, use_cache=False).logits[0, first:end].float())
    moved_by = float((seen[0] - seen[1]).abs().max() / seen[0].abs().max())
    if not moved_by <= APART_TOLERANCE:
        raise TrainingFailed(
            Reason.BAD_SPEC,
            "training.packing: in this model's attention packed examples see each other "
            f"(logits moved by {100 * moved_by:.0f} %); set packing: false",
        )


def _joined(examples: Sequence[TokenRow]) -> TokenRow:
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for example in examples:
        if ids:
            starts.append(len(ids))
        ids += example.input_ids
        labels += [IGNORED, *example.labels[1:]]
    return TokenRow(number=examples[0].number, input_ids=ids, labels=labels, starts=tuple(starts))
