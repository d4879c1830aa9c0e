"""Causal attention of short rows on a CPU, by plain matrix products.

torch's fused kernel spends most of its time there on conversions: in 16 bit its backward pass takes three to five times
what the products themselves take. With tiles (AMX) it takes 1.3 to 2 times as long, for rows of less than 256 tokens.
Only one row's scores of one layer exist at a time, and they are recomputed in the backward pass, so memory grows only
with the tokens, as in the fused kernel. If a CPU is faster that way, all of a row is computed in fp32 and rounded at
its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from loractl.worker.base.processor import has_tiles

from . import wide

SHORT = 256 if has_tiles() else 512
"""Tokens of a row up to which its scores are small: for 512 tokens 32 heads take 16 MiB, and twice that in fp32. With
tiles torch's kernel takes half the time of plain products for 512 tokens, and as much for 300."""


class ShortRows(torch.autograd.Function):
    """Attention of concatenated rows. Shapes: (1, heads, tokens, width) in, (1, tokens, heads, width) out."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scaling: float
    ) -> torch.Tensor:
        _, heads, tokens, width = query.shape
        answer = query.new_empty(1, tokens, heads, width)
        with wide.as_it_is(query):
            for row in _rows(lengths):
                scores, _, _ = _scores(query, key, row, scaling)
                seen = torch.bmm(scores, _own(value[0, :, row]))
                answer[0, row].copy_(_by_token(seen, heads))
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scaling = lengths, scaling
        return answer

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        groups = key.shape[1]
        to_query, to_key, to_value = (torch.empty_like(states) for states in (query, key, value))
        for row in _rows(ctx.lengths):
            scores, asked, keys = _scores(query, key, row, ctx.scaling)
            of_seen = _by_group(given[0, row].transpose(0, 1), groups)
            to_value[0, :, row] = torch.bmm(scores.transpose(1, 2), of_seen)
            of_scores = torch.bmm(of_seen, _own(value[0, :, row]).transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_scores, scores, -1, scores.dtype)
            to_key[0, :, row] = torch.bmm(of_scores.transpose(1, 2), asked)
            of_query = torch.bmm(of_scores, keys).mul_(ctx.scaling)
            to_query[0, :, row] = _by_token(of_query, query.shape[1]).transpose(0, 1)
        return to_query, to_key, to_value, None, None


def _rows(lengths: Sequence[int]) -> Iterator[slice]:
    begin = 0
    for length in lengths:
        yield slice(begin, begin + length)
        begin += length


def _scores(
    query: torch.Tensor, key: torch.Tensor, row: slice, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The attention weights of each token of a row for the tokens before it, of shape (groups, heads of a group x
    tokens, tokens); the scaled queries and the keys."""
    length, keys = row.stop - row.start, _own(key[0, :, row])
    asked = _by_group(query[0, :, row], len(keys)).mul_(scaling)
    products = torch.bmm(asked, keys.transpose(1, 2))
    # added: masked filling takes three times as long
    later = asked.new_full((length, length), float("-inf")).triu_(1)
    products.view(-1, length, length).add_(later)
    return torch.softmax(products, -1), asked, keys


def _own(states: torch.Tensor) -> torch.Tensor:
    """In their own memory, in the type in which a row is computed."""
    return states.to(_kind(states)).contiguous()


def _kind(states: torch.Tensor) -> torch.dtype:
    return torch.float32 if wide.widens(states) else states.dtype


def _by_group(states: torch.Tensor, groups: int) -> torch.Tensor:
    """(heads, tokens, width) as (groups, heads of a group x tokens, width), in its own memory."""
    heads, length, width = states.shape
    gathered = states.new_empty(groups, heads // groups * length, width, dtype=_kind(states))
    gathered.view(heads, length, width).copy_(states)
    return gathered


def _by_token(states: torch.Tensor, heads: int) -> torch.Tensor:
    """(groups, heads of a group x tokens, width) as (tokens, heads, width)."""
    return states.view(heads, -1, states.shape[-1]).transpose(0, 1)
