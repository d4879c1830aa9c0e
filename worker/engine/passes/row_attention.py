"""Attention of rows concatenated in one row of tokens: none sees another, and nothing is padded."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from loractl.worker.base.shared_heads import kind_of

from . import varlen
from .attention import SHORT, ShortRows

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

    @property
    def lengths(self) -> list[int]:
        """The lengths of the rows of the current pass."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: list[int]) -> None:
        self._lengths, self._borders, self.by_row = lengths, None, None

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **how: Any
    ) -> tuple[torch.Tensor, None]:
        window = how.get("sliding_window")
        if self._at_once(query, key, value, window, how):
            if self._borders is None:
                self._borders = varlen.borders_of(self.lengths, query.device)
            longest = max(self.lengths)
            return varlen.attend(query, key, value, self._borders, longest, how.get("scaling"), window), None
        short = self._short(query, key, value, window, how)
        # row by row: a row's computation does not depend on another row, which may be another training's
        runs = [(few, list(run)) for few, run in itertools.groupby(self.lengths, lambda length: length <= short)]
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
        if query.device.type not in varlen.PLACES or len(self.lengths) == 1:
            return False
        why = self._why_not(query, key, value, window, how)
        self.by_row = self.by_row or why
        return why is None

    def _why_not(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, how: dict[str, Any]
    ) -> str | None:
        if self._own != "sdpa":
            return f"the model's attention is {self._own}, not sdpa"
        if key.shape != value.shape:
            return "the model's keys and values differ in width"
        if how.get("dropout") or how.get("position_bias") is not None:
            return "the model's attention has dropout or a bias for positions"
        narrow = window is not None and window < max(self.lengths)
        return varlen.why_not(query.device, kind_of(query), query.shape[-1], narrow)

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

    @contextlib.contextmanager
    def of(self, lengths: list[int]) -> Iterator[None]:
        """Rows of these lengths are in the single row that the model gets, until their backward pass is over:
        recomputed blocks need that too."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.own in BY_POSITION:
            yield
            return
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)
        self._attention.lengths = lengths
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
