"""Attention of rows concatenated in one row of tokens: none sees another, and nothing is padded.

On cards that have it, one kernel takes rows of any lengths (FlashAttention 2, arXiv:2307.08691). Row by row a layer
starts kernels for each row, and a step of many short rows waits for their starts.

On a CPU short rows take plain matrix products. torch's fused kernel spends most of its time there on conversions: in 16
bit its backward pass takes three to five times what the products themselves take. With tiles (AMX) it takes 1.3 to 2
times as long, for rows of less than 256 tokens. Only one row's scores of one layer exist at a time, and they are
recomputed in the backward pass, so memory grows only with the tokens, as in the fused kernel. If a CPU is faster that
way, all of a row is computed in fp32 and rounded at its end.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.base.processor import has_tiles
from loractl.worker.base.shared_heads import kind_of
from loractl.worker.base.source import first_line

from ..passes import wide

KERNEL = "torch.nn.attention.varlen"

PLACES = ("cuda",)
"""Kinds of devices that have this kernel."""

AMPERE = (8, 0)
"""The compute capability that the kernel needs."""

WITHIN = 0.03
"""Share of the largest number by which answers and gradients in 16 bit may differ from those in fp32."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of concatenated rows. `borders`: where each row begins, and where the last one ends, as int32
    (rows + 1). `window`: the number of tokens that a token sees, including itself; None: all before it.

    Shapes: query (1, heads, tokens, width), key and value (1, groups, tokens, width), output (1, tokens, heads, width).
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states.to(kind_of(states)).squeeze(0).transpose(0, 1) for states in (query, key, value))
    before = -1 if window is None or window >= longest else window - 1
    sides = {"window_size": (before, 0), "enable_gqa": True}
    answer = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scaling, **sides)
    assert isinstance(answer, torch.Tensor)  # only the output was requested
    return answer[None]


def borders_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@functools.cache
def why_no_kernel(device: torch.device, kind: torch.dtype, width: int, windowed: bool) -> str | None:
    """Why rows with heads of this width do not go through one kernel there. None: the kernel exists, and computes a few
    rows like plain products, forwards and backwards."""
    if importlib.util.find_spec(KERNEL) is None:
        return f"torch {torch.__version__} has no kernel for rows of any lengths"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        return "cards before Ampere have no kernel for rows of any lengths"
    try:
        right = _is_right(device, kind, width, 3 if windowed else None)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"the kernel for rows of any lengths does not take these ({first_line(error)})"
    return None if right else "the kernel for rows of any lengths computes something else"


def _is_right(device: torch.device, kind: torch.dtype, width: int, window: int | None) -> bool:
    lengths, random = (5, 1, 9), torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), width) for heads in (4, 2, 2)]
    states = [torch.randn(shape, generator=random).to(device, kind) for shape in shapes]
    given = torch.randn((1, sum(lengths), 4, width), generator=random).to(device, kind)
    # a block that will be recomputed may ask first: checkpointing would take what is saved here for the block's own
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), as_it_is:
        q, k, v = ours = [one.clone().requires_grad_() for one in states]
        answer = attend(q, k, v, borders_of(lengths, device), max(lengths), None, window)
        q, k, v = theirs = [one.float().requires_grad_() for one in states]
        expected = _by_products(q, k, v, lengths, window)
        pairs = [(answer.detach(), expected.detach())]
        pairs += zip(
            torch.autograd.grad(answer, ours, given), torch.autograd.grad(expected, theirs, given.float()), strict=True
        )
    return all(bool((a.float() - b).abs().max() <= WITHIN * b.abs().max()) for a, b in pairs)


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], window: int | None
) -> torch.Tensor:
    rows = []
    for q, k, v in zip(*(states[0].split(lengths, dim=1) for states in (query, key, value)), strict=True):
        shared = len(q) // len(k)
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        seen = seen if window is None else seen.triu(1 - window)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)[None]


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


NAME = "loractl_rows"
"""The name of this attention in a model's configs while rows are concatenated."""

BY_POSITION = ("flash_attention_2",)
"""Attention that itself tells rows apart where position ids restart (transformers' variable-length kernels)."""


class RowAttention:
    """A model's own attention of each row: on a card by one kernel for all of them if it has that, else by
    transformers' kernel, called with each row's queries and keys.

    One attention over a block mask costs the square of all rows together, and lets a NaN through (0 x NaN).
    """

    def __init__(self, own: str) -> None:
        self._own = own  # sdpa or eager, as the model was loaded with it
        self._lengths: list[int] = []
        self._borders: torch.Tensor | None = None  # of these, on the card
        self.by_row: str | None = None  # why several went one by one, on a card
        self.called = False  # by the model's code in the current pass

    def begin(self, lengths: list[int]) -> None:
        """Rows of these lengths are in the passes from now on."""
        self._lengths, self._borders, self.by_row, self.called = lengths, None, None, False

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **how: Any
    ) -> tuple[torch.Tensor, None]:
        self.called = True
        window = how.get("sliding_window")
        if self._at_once(query, key, value, window, how):
            if self._borders is None:
                self._borders = borders_of(self._lengths, query.device)
            longest = max(self._lengths)
            return attend(query, key, value, self._borders, longest, how.get("scaling"), window), None
        short = self._short(query, key, value, window, how)
        # row by row: a row's computation does not depend on another row, which may be another training's
        runs = [(few, list(run)) for few, run in itertools.groupby(self._lengths, lambda length: length <= short)]
        parts = [(query, key, value)] if len(runs) == 1 else _split((query, key, value), [sum(run) for _, run in runs])
        answers = [
            ShortRows.apply(*states, tuple(run), how["scaling"]) if few else self._by_kernel(module, states, run, how)
            for (few, run), states in zip(runs, parts, strict=True)
        ]
        return answers[0] if len(answers) == 1 else torch.cat(answers, dim=1), None

    def _by_kernel(
        self, module: Any, states: Sequence[torch.Tensor], lengths: list[int], how: dict[str, Any]
    ) -> torch.Tensor:
        kernel, window = self._kernel(module), how.get("sliding_window")
        rows = [kernel(module, *row, self._mask(row[0], window), **how)[0] for row in _split(states, lengths)]
        return torch.cat(rows, dim=1)

    def _at_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, how: dict[str, Any]
    ) -> bool:
        """Whether one kernel computes all rows, like the fused kernel that each would have gone through."""
        if query.device.type not in PLACES or len(self._lengths) == 1:
            return False
        why = self._why_no_kernel(query, key, value, window, how)
        self.by_row = self.by_row or why
        return why is None

    def _why_no_kernel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, how: dict[str, Any]
    ) -> str | None:
        if self._own != "sdpa":
            return f"the model's attention is {self._own}, not sdpa"
        if key.shape != value.shape:
            return "the model's keys and values differ in width"
        if how.get("dropout") or how.get("position_bias") is not None:
            return "the model's attention has dropout or a bias for positions"
        narrow = window is not None and window < max(self._lengths)
        return why_no_kernel(query.device, kind_of(query), query.shape[-1], narrow)

    def _short(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, how: dict[str, Any]
    ) -> int:
        """Tokens of a row up to which plain products are faster than the fused kernel; 0 if they never are. A trace,
        whose tensors are another type, counts what a card's kernels take."""
        plain = self._own == "sdpa" and type(query) is torch.Tensor and not query.is_cuda
        alike = key.shape == value.shape and query.shape[1] % key.shape[1] == 0
        unchanged = not how.get("dropout") and how.get("scaling") is not None and how.get("position_bias") is None
        if not (plain and alike and unchanged and query.dtype == torch.bfloat16):
            return 0
        return SHORT if window is None else min(SHORT, window)

    def _kernel(self, module: Any) -> Callable[..., Any]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if self._own == "sdpa":
            return sdpa_attention_forward
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return eager

    def _mask(self, query: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """The causal mask of one row, which the fused kernels need only if a window is shorter than the row."""
        length = query.shape[2]
        narrow = window is not None and window < length
        if self._own == "sdpa" and not narrow:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if narrow and window is not None:
            seen = seen.triu(1 - window)
        if self._own == "sdpa":
            return seen[None, None]
        hidden = torch.zeros(length, length, dtype=query.dtype, device=query.device)
        return hidden.masked_fill_(~seen, torch.finfo(query.dtype).min)[None, None]


def _split(states: Sequence[torch.Tensor], lengths: list[int]) -> list[tuple[torch.Tensor, ...]]:
    """Queries, keys and values of the rows with these lengths. Not by slices, whose backward pass creates a full-size
    tensor for each part."""
    return list(zip(*(one.split(lengths, dim=2) for one in states), strict=True))


class RowLayout:
    """Puts row attention in place of a model's own while rows are concatenated."""

    def __init__(self, model: Any) -> None:
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]
        self.own = str(model.config.get_text_config()._attn_implementation)
        self._attention = RowAttention(self.own)

    @property
    def by_row(self) -> str | None:
        """Why, on a card, several rows went through a layer one by one in the last pass; None: they did not."""
        return self._attention.by_row

    @property
    def tells_apart(self) -> bool:
        """Whether attention told rows apart in the last pass; a model with attention of its own calls no other."""
        return self.own in BY_POSITION or self._attention.called

    @contextlib.contextmanager
    def of(self, lengths: list[int]) -> Iterator[None]:
        """Rows of these lengths are in the single row that the model gets, until their backward pass is over:
        recomputed blocks need that too."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.own in BY_POSITION:
            yield
            return
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)
        self._attention.begin(lengths)
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
