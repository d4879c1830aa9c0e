"""Answers, token by token: requests for different adapters share one batch, and join and leave it between tokens.

A lane is a batch with its cache of keys and values. Adapters that mix share one lane; an adapter that does not (DoRA,
modules trained in full) has a lane of its own, and lanes take turns.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import DynamicCache

from loractl.common.errors import LoractlError, UsageError
from loractl.worker.base.gauge import is_out_of_memory, release
from loractl.worker.evaluation.generation import end_ids

from .adapter_pool import BASE, Loaded, NoRoom, Resident
from .library import Listed

log = logging.getLogger("loractl.worker")

HOST_CACHE_BYTES = 2 * 2**30
"""What keys and values may take on a processor."""

DEVICE_CACHE_SHARE = 0.6
"""Of what is free on a card beside base and adapters; the rest is for the prompts that are read."""

READ_TOKENS = 8192
"""Rows times tokens of the prompts that are read in one pass."""

Found = TypeVar("Found")
Ending = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What came of a request in this step: text that is settled, and at the end why it ended."""

    text: str = ""
    tokens: int = 0  # generated so far
    ended: Ending | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request for one answer."""

    prompt: Sequence[int]
    say: Callable[[Said], None]  # called by the thread that steps
    max_new_tokens: int
    adapter: Listed | None = None  # None: the base alone
    folder: Path | None = None  # the adapter's files
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def width(self) -> int:
        """Tokens at the most."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batch may grow to."""

    rows: int = 32
    cache_bytes: int | None = None  # None: by what is free


class TooLong(UsageError):
    """A request that no batch can hold."""


class Engine:
    """Answers requests on a resident base. `ask` is for any thread; one thread at a time steps."""

    def __init__(self, resident: Resident, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self._resident = resident
        self._ends = end_ids(resident.model, resident.tokenizer)
        self._rows = limits.rows
        self._lock = threading.Condition()
        self._waiting: deque[Ask] = deque()
        self._lanes: dict[str, _Lane] = {}
        self._turn = 0
        self._token_bytes = _bytes_a_token(resident)
        self._cache_bytes = _cache_bytes(resident) if limits.cache_bytes is None else limits.cache_bytes
        self.context = int(getattr(resident.config.get_text_config(), "max_position_embeddings", 2**31 - 1))

    @property
    def tokenizer(self) -> Any:
        return self._resident.tokenizer

    @property
    def cache_tokens(self) -> int:
        """Rows times tokens that fit into the cache."""
        return self._cache_bytes // max(1, self._token_bytes)

    @property
    def running(self) -> int:
        return sum(len(lane.rows) for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def room(self, prompt: int) -> int:
        """Tokens that an answer to so long a prompt may have. Raises TooLong."""
        left = min(self.context, self.cache_tokens) - prompt
        if left < 1:
            limit = min(self.context, self.cache_tokens)
            raise TooLong(f"the prompt has {prompt} tokens, the model takes {limit} with its answer", "shorten it")
        return left

    def ask(self, ask: Ask) -> None:
        """Queue a request. Raises TooLong."""
        if ask.max_new_tokens > self.room(len(ask.prompt)):
            raise TooLong(f"{ask.width} tokens are more than {min(self.context, self.cache_tokens)}", "ask for fewer")
        with self._lock:
            self._waiting.append(ask)
            self._lock.notify_all()

    def wait(self, seconds: float) -> None:
        """Sleep until there is something to do."""
        with self._lock:
            if not self._waiting and not self._lanes:
                self._lock.wait(seconds)

    def step(self) -> bool:
        """Admit what fits, and give every row of one lane its next token; False when there is nothing to do."""
        self._admit()
        if not self._lanes:
            return bool(self._waiting)
        names = list(self._lanes)
        name = names[self._turn % len(names)]
        self._turn += 1
        lane = self._lanes[name]
        self._tried(lane.step, lane.rows, lane)
        if not lane.rows:
            del self._lanes[name]
        return True

    def fail_all(self, why: str) -> None:
        """End every request with an error: for who can't step any more."""
        for lane in self._lanes.values():
            for row in lane.rows:
                row.fail(why)
        self._lanes.clear()
        while self._waiting:
            self._next().say(Said(ended="error", error=why))

    def finish(self) -> None:
        """Step until every request is answered."""
        while self.step():
            pass

    def _admit(self) -> None:
        """Take waiting requests in their order, as far as rows, cache and adapters' memory allow."""
        self._drop_cancelled()
        joining: dict[str, list[_Row]] = {}
        new: list[_Row] = []
        while self._waiting and self.running + len(new) < self._rows:
            ask = self._waiting[0]
            if not self._fits(ask, new):
                break
            try:
                row = self._begin(ask)
            except NoRoom:
                break  # somebody's answer will end and free an adapter
            except LoractlError as error:
                self._next().say(Said(ended="error", error=error.sentence))
                continue
            except Exception as error:
                log.exception("a request failed before it began")
                self._next().say(Said(ended="error", error=_sentence(error)))
                continue
            self._next()
            new.append(row)
            joining.setdefault(row.lane, []).append(row)
        for name, rows in joining.items():
            lane = self._lanes.setdefault(name, _Lane(self._resident, self._ends))
            for some in _readable(rows):
                # while its prompts are read the lane is as before: a failure there is that of the new rows alone
                read = self._tried(partial(lane.read, some), some)
                if read is not None:
                    self._tried(partial(lane.join, some, read), [*lane.rows, *some], lane)
            if not lane.rows:
                del self._lanes[name]

    def _drop_cancelled(self) -> None:
        """Those who have left must not count among those who wait."""
        with self._lock:
            gone = [ask for ask in self._waiting if ask.cancelled.is_set()]
            for ask in gone:
                self._waiting.remove(ask)
        for ask in gone:
            ask.say(Said(ended="cancelled"))

    def _next(self) -> Ask:
        with self._lock:
            return self._waiting.popleft()

    def _begin(self, ask: Ask) -> _Row:
        held = None
        if ask.adapter is not None and ask.folder is not None:
            held = self._resident.hold(ask.adapter, ask.folder)
        return _Row(ask, held, self._resident)

    def _fits(self, ask: Ask, joining: list[_Row]) -> bool:
        """Whether the cache holds all rows at their longest, each padded to the widest of its lane, with this one."""
        rows = [*joining, *(row for lane in self._lanes.values() for row in lane.rows)]
        if not rows:
            return True  # alone it fits: `ask` has looked
        widest = max(ask.width, *(row.ask.width for row in rows))
        return (len(rows) + 1) * widest <= self.cache_tokens

    def _tried(self, work: Callable[[], Found], rows: Sequence[_Row], lane: _Lane | None = None) -> Found | None:
        """Do it; a failure ends these rows, and empties the lane, and nothing else."""
        rows = list(rows)
        try:
            return work()
        except Exception as error:
            log.exception("%s requests failed", len(rows))
            why = _sentence(error)
        except BaseException:  # a person's Ctrl-C: nothing may be left half-way
            self._end(rows, lane, "interrupted")
            raise
        self._end(rows, lane, why)
        release()  # outside of the handler: until it ends, the error's traceback holds the tensors
        return None

    def _end(self, rows: Sequence[_Row], lane: _Lane | None, why: str) -> None:
        if lane is not None:
            lane.clear()
        for row in rows:
            row.fail(why)


def _sentence(error: Exception) -> str:
    if isinstance(error, LoractlError):
        return error.sentence
    return "the device ran out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"


def _readable(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows whose prompts are read in one pass, each padded to the longest of them."""
    some: list[_Row] = []
    for row in rows:
        widest = max(len(each.ask.prompt) for each in (*some, row))
        if some and (len(some) + 1) * widest > READ_TOKENS:
            yield some
            some = []
        some.append(row)
    yield some


class _Lane:
    """One batch: rows, the cache of their keys and values, and which of its columns are padding."""

    def __init__(self, resident: Resident, ends: set[int]) -> None:
        self._resident = resident
        self._ends = ends
        self.rows: list[_Row] = []
        self._cache: Any = None
        self._mask = torch.empty(0, 0, dtype=torch.long)

    def clear(self) -> None:
        self.rows, self._cache = [], None

    def join(self, rows: Sequence[_Row], read: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
        """Take new rows, whose prompts are read, into the batch with their first token."""
        cache, mask, logits = read
        if self.rows:
            self._cache, self._mask = _side_by_side((self._cache, self._mask), (cache, mask))
        else:
            self._cache, self._mask = cache, mask
        self.rows += rows
        self._say(rows, logits)

    def step(self) -> None:
        """The next token of every row."""
        if any(row.ask.cancelled.is_set() for row in self.rows):
            self._drop_ended()
            if not self.rows:
                return
        last = torch.tensor([[row.last] for row in self.rows], device=self._mask.device)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        logits = self._forward(self.rows, last, self._mask, self._cache)
        self._say(self.rows, logits)

    def read(self, rows: Sequence[_Row]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """(cache, mask, logits of the first token) of new rows' prompts; the batch is as before."""
        longest = max(len(row.ask.prompt) for row in rows)
        pad = self._resident.tokenizer.pad_token_id
        device = self._resident.model.device
        ids = [[pad] * (longest - len(row.ask.prompt)) + list(row.ask.prompt) for row in rows]
        mask = [[0] * (longest - len(row.ask.prompt)) + [1] * len(row.ask.prompt) for row in rows]
        cache = DynamicCache()
        marks = torch.tensor(mask, device=device)
        return cache, marks, self._forward(rows, torch.tensor(ids, device=device), marks, cache)

    def _forward(self, rows: Sequence[_Row], ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        """fp32 logits of the last column, shape (rows, vocabulary)."""
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self._resident.forward(
            [row.key for row in rows],
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    def _say(self, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        likeliest = logits.argmax(-1).tolist()
        for place, row in enumerate(rows):
            try:
                token = likeliest[place] if row.ask.temperature == 0 else row.draw(logits[place])
                row.take(token, ended=token in self._ends)
            except Exception as error:
                log.exception("one request failed")  # its own fault, like logits that are no numbers: others go on
                row.fail(_sentence(error))
        self._drop_ended()

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
        unused = int(self._mask.any(0).int().argmax())  # columns that are padding in every row that is left
        if unused:
            self._mask = self._mask[:, unused:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]


class _Row:
    """One request while it is answered."""

    def __init__(self, ask: Ask, held: Loaded | None, resident: Resident) -> None:
        self.ask = ask
        self.last = -1
        self.over = False
        self.key = BASE if held is None else held.key
        self.lane = "" if held is None or held.mixes else held.key
        self._held = held
        self._resident = resident
        self._text = _Text(resident.tokenizer, ask.stop)
        self._tokens = 0
        self._random: torch.Generator | None = None

    def draw(self, logits: torch.Tensor) -> int:
        """A token by temperature and nucleus (top-p, arXiv:1904.09751), drawn on the processor, so that a seed draws
        the same on every device."""
        if self._random is None:
            self._random = torch.Generator()
            if self.ask.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(self.ask.seed)
        # the largest one is taken off first: a tiny temperature would make infinity of it
        shares = torch.softmax((logits - logits.max()).double() / self.ask.temperature, -1).cpu()
        if self.ask.top_p >= 1:
            return int(torch.multinomial(shares, 1, generator=self._random))
        shares, order = shares.sort(descending=True)
        inside = shares.cumsum(-1) - shares < self.ask.top_p
        return int(order[torch.multinomial(shares * inside, 1, generator=self._random)])

    def take(self, token: int, *, ended: bool) -> None:
        """The next token; `ended`: it is one that ends an answer."""
        self.last = token
        self._tokens += 1
        if ended:
            self.end("stop")
            return
        text, stopped = self._text.add(token)
        if stopped:
            self._close("stop", text)
        elif self._tokens >= self.ask.max_new_tokens:
            self._close("length", text + self._text.rest())
        elif text:
            self.ask.say(Said(text=text, tokens=self._tokens))

    def end(self, why: Ending) -> None:
        self._close(why, self._text.rest())

    def fail(self, why: str) -> None:
        if not self.over:
            self._let_go()
            self.ask.say(Said(tokens=self._tokens, ended="error", error=why))

    def _close(self, why: Ending, text: str) -> None:
        self._let_go()
        self.ask.say(Said(text=text, tokens=self._tokens, ended=why))

    def _let_go(self) -> None:
        self.over = True
        if self._held is not None:
            self._resident.let_go(self._held)


class _Text:
    """Tokens to text as they come: a character of several tokens is held back, and so is what may begin a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._begin = self._told = 0  # text up to `told` is given; decoding begins a little before it
        self._pending = ""

    def add(self, token: int) -> tuple[str, bool]:
        """(text that is settled, whether a stop text came)."""
        self._ids.append(token)
        before, now = self._decode(self._begin, self._told), self._decode(self._begin, None)
        if len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
            self._begin, self._told = self._told, len(self._ids)
            self._pending += now[len(before) :]
        found = [place for text in self._stop if (place := self._pending.find(text)) >= 0]
        if found:
            return self._pending[: min(found)], True
        held = max((_overlap(self._pending, text) for text in self._stop), default=0)
        settled = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(settled) :]
        return settled, False

    def rest(self) -> str:
        """What is held back still."""
        before, now = self._decode(self._begin, self._told), self._decode(self._begin, None)
        self._told = len(self._ids)
        return self._pending + now[len(before) :]

    def _decode(self, begin: int, end: int | None) -> str:
        text: str = self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that begin the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


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
        for old in (a, b):  # layer by layer, or both batches would be held twice
            old.keys = old.values = None
    return merged, mask


def _bytes_a_token(resident: Resident) -> int:
    """Bytes of keys and values a token, measured. Raises UsageError for a model with another kind of memory."""
    name = resident.base.model
    cache = DynamicCache()
    one = torch.tensor([[resident.tokenizer.eos_token_id]], device=resident.model.device)
    try:
        resident.forward([BASE], input_ids=one, cache=cache, use_cache=True)
    except (AttributeError, TypeError, ValueError, LookupError) as error:  # each kind of model fails in its own way
        raise UsageError(f"{name} can't be served: it keeps no plain cache of keys and values ({error})") from error
    layers = cache.layers
    if not layers or any(layer.keys is None or layer.keys.ndim != 4 or layer.keys.shape[-2] != 1 for layer in layers):
        raise UsageError(f"{name} can't be served: not all of its layers keep keys and values")
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def _cache_bytes(resident: Resident) -> int:
    if resident.base.device == "cuda":
        return int(DEVICE_CACHE_SHARE * max(0, torch.cuda.mem_get_info()[0] - resident.adapter_memory))
    return HOST_CACHE_BYTES
