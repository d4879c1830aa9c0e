"""One batch: rows that get their next token together, and their cache of keys and values.

Rows join it after their prompts are read, and leave it when their answers end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from loractl.common.errors import LoractlError, UsageError
from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.serving.adapter_pool import BASE, AdapterPool

from .request import Row

log = logging.getLogger("loractl.worker")

MOST_LOGITS = 2**26
"""Logits in memory at a time while computing prompts' log-probabilities: 256 MiB."""


class Lane:
    """One batch: rows, the cache of their keys and values, and which of its columns are padding."""

    def __init__(self, pool: AdapterPool, ends: set[int]) -> None:
        self._pool = pool
        self._ends = ends
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask = torch.empty(0, 0, dtype=torch.long)

    def clear(self) -> None:
        self.rows, self._cache = [], None

    def join(self, rows: Sequence[Row], read: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
        """Take new rows into the batch, with their prompts read and their first token."""
        cache, mask, logits = read
        new = Lane(self._pool, self._ends)
        new.rows, new._cache, new._mask = list(rows), cache, mask
        new._say(new.rows, logits)  # first: an answer that ends here, as when only a prompt is scored, costs no merge
        if self.rows and new.rows:
            self._cache, self._mask = _side_by_side((self._cache, self._mask), (new._cache, new._mask))
        elif new.rows:
            self._cache, self._mask = new._cache, new._mask
        self.rows += new.rows

    def step(self) -> None:
        """The next token of every row."""
        if any(row.ask.cancelled.is_set() for row in self.rows):
            self._drop_ended()
            if not self.rows:
                return
        last = torch.tensor([[row.last] for row in self.rows], device=self._mask.device)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._say(self.rows, self._forward(self.rows, last, self._mask, self._cache)[:, -1])

    def read(self, rows: Sequence[Row]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """(cache, mask, logits of the first token) of new rows' prompts; the batch does not change. Either all of them
        or none want their prompts' log-probabilities."""
        longest = max(len(row.ask.prompt) for row in rows)
        pad = self._pool.tokenizer.pad_token_id
        device = self._pool.model.device
        ids = [[pad] * (longest - len(row.ask.prompt)) + list(row.ask.prompt) for row in rows]
        mask = [[0] * (longest - len(row.ask.prompt)) + [1] * len(row.ask.prompt) for row in rows]
        cache = DynamicCache()
        tokens, marks = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
        if not rows[0].ask.prompt_logprobs:
            return cache, marks, self._forward(rows, tokens, marks, cache)[:, -1]
        logits = marks
        at_once = max(1, MOST_LOGITS // (len(rows) * int(self._pool.model.config.get_text_config().vocab_size)))
        for begin in range(0, longest, at_once):
            end = min(begin + at_once, longest)
            logits = self._forward(rows, tokens[:, begin:end], marks[:, :end], cache, keep=end - begin)
            for row, own in zip(rows, logits, strict=True):
                unused = longest - len(row.ask.prompt)
                if end > unused and not row.over:
                    _alone(row, partial(row.score_prompt, own[max(0, unused - begin) :], max(0, begin - unused)))
        return cache, marks, logits[:, -1]

    def _forward(
        self, rows: Sequence[Row], ids: torch.Tensor, mask: torch.Tensor, cache: Any, *, keep: int = 1
    ) -> torch.Tensor:
        """fp32 logits of the last `keep` columns, of shape (rows, keep, vocabulary)."""
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self._pool.forward(
            [row.key for row in rows],
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            cache=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = out.logits[:, -keep:].float()
        return logits

    def _say(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        likeliest = logits.argmax(-1).tolist()
        for place, row in enumerate(rows):
            if not row.over:
                _alone(row, partial(self._next, row, logits[place], likeliest[place]))
        self._drop_ended()

    def _next(self, row: Row, logits: torch.Tensor, likeliest: int) -> None:
        if not row.ask.max_new_tokens:
            row.end("length")
            return
        token = row.choose(logits, likeliest)
        row.take(token, ended=token in self._ends)

    def _drop_ended(self) -> None:
        for row in self.rows:
            if row.ask.cancelled.is_set() and not row.over:
                row.end("cancelled")
        keep = [n for n, row in enumerate(self.rows) if not row.over]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[n] for n in keep]
        if not self.rows:
            self._cache = None
            return
        index = torch.tensor(keep, device=self._mask.device)
        self._mask = self._mask[index]
        self._cache.batch_select_indices(index)
        unused = int(self._mask.any(0).int().argmax())  # columns that are padding in every remaining row
        if unused:
            self._mask = self._mask[:, unused:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]


def _alone(row: Row, work: Callable[[], None]) -> None:
    """Do the work of one row: a failure, like a NaN logit, ends only that row, and others continue."""
    try:
        work()
    except UsageError as error:  # a form that can't be met any further
        row.fail(error.sentence, refused=True)
    except Exception as error:
        log.exception("one request failed")
        row.fail(failure_sentence(error))


def _side_by_side(left: tuple[Any, torch.Tensor], right: tuple[Any, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Two batches as one: caches and masks, padded on the left to the wider one."""
    width = max(left[1].shape[1], right[1].shape[1])
    mask = torch.cat([torch.nn.functional.pad(m, (width - m.shape[1], 0)) for _, m in (left, right)])
    merged = DynamicCache()
    for number, (a, b) in enumerate(zip(left[0].layers, right[0].layers, strict=True)):
        keys, values = (
            torch.cat([torch.nn.functional.pad(t, (0, 0, width - t.shape[-2], 0)) for t in pair])
            for pair in ((a.keys, b.keys), (a.values, b.values))
        )
        merged.update(keys, values, number)
        for old in (a, b):  # layer by layer, or both batches would be in memory twice
            old.keys = old.values = None
    return merged, mask


def bytes_a_token(pool: AdapterPool) -> int:
    """Measured bytes of keys and values per token. Raises UsageError for a model with another kind of memory."""
    name = pool.base.model
    cache = DynamicCache()
    token = torch.tensor([[pool.tokenizer.eos_token_id]], device=pool.model.device)
    try:
        pool.forward([BASE], input_ids=token, cache=cache, use_cache=True)
    except (AttributeError, TypeError, ValueError, LookupError) as error:  # each kind of model fails in its own way
        raise UsageError(f"{name} can't be served: it keeps no plain cache of keys and values ({error})") from error
    layers = cache.layers
    if not layers or any(layer.keys is None or layer.keys.ndim != 4 or layer.keys.shape[-2] != 1 for layer in layers):
        raise UsageError(f"{name} can't be served: not all of its layers keep keys and values")
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def failure_sentence(error: Exception) -> str:
    if isinstance(error, LoractlError):
        return error.sentence
    return "the device ran out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
