"""Packing: rows of several examples that can't see each other, so that little of a batch is padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace

from loractl.common.job.spec import JobSpec

from .prepared import PreparedData
from .token_rows import TokenRows
from .tokens import TokenRow, joined


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
    return [joined(examples) for examples in bins]
