"""Answers, token by token: requests for different adapters share one batch, and join and leave it between tokens.

A lane is such a batch. Adapters that mix share one lane; an adapter that does not (DoRA, modules trained in full) has
its own lane, and lanes take turns.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from loractl.common.errors import LoractlError, UsageError
from loractl.worker.base.gauge import release
from loractl.worker.evaluation.row_losses import end_ids
from loractl.worker.serving.adapter_pool import AdapterPool, NoRoom
from loractl.worker.serving.library import Listed

from .grammar import GrammarCompiler
from .lane import Lane, bytes_a_token, failure_sentence
from .request import Ask, Row, Said

log = logging.getLogger("loractl.worker")

HOST_CACHE_BYTES = 2 * 2**30
"""What keys and values may take on a CPU."""

DEVICE_CACHE_SHARE = 0.6
"""Share of a card's free memory, after base and adapters. The rest is for prompts being read."""

READ_TOKENS = 8192
"""Rows times tokens of the prompts read in one pass."""

Result = TypeVar("Result")


class TooLong(UsageError):
    """A request that no batch can hold."""


class Decoder:
    """Answers requests on a base in memory. Any thread may call `ask`; one thread at a time steps."""

    def __init__(self, pool: AdapterPool, *, rows: int = 32, cache_bytes: int | None = None) -> None:
        """`rows`: how many a batch may have. `cache_bytes`: of keys and values; None: from the free memory."""
        self._pool = pool
        self._ends = end_ids(pool.model, pool.tokenizer)
        self.forms = GrammarCompiler(pool.tokenizer, self._ends)
        self._rows = rows
        self._lock = threading.Condition()
        self._waiting: deque[Ask] = deque()
        self._lanes: dict[str, Lane] = {}
        self._turn = 0
        self._token_bytes = bytes_a_token(pool)
        self._cache_bytes = _cache_bytes(pool) if cache_bytes is None else cache_bytes
        self.context = int(getattr(pool.model.config.get_text_config(), "max_position_embeddings", 2**31 - 1))

    @property
    def tokenizer(self) -> Any:
        return self._pool.tokenizer

    def arithmetic(self, adapter: Listed | None) -> dict[str, Any]:
        """The arithmetic of the base here and, with an adapter, that of its training, and whether they are the same."""
        here = {"served_in": self._pool.number_format}
        if adapter is None:
            return here
        return {**here, "trained_in": str(adapter.arithmetic), "as_trained": self._pool.as_trained(adapter)}

    @property
    def cache_tokens(self) -> int:
        """Rows times tokens that fit into the cache."""
        return self._cache_bytes // max(1, self._token_bytes)

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.context, self.cache_tokens)

    @property
    def running(self) -> int:
        return sum(len(lane.rows) for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def vocabulary(self) -> int:
        """Tokens have numbers below it."""
        return int(self._pool.model.config.get_text_config().vocab_size)

    def room(self, prompt: int, least: int = 1) -> int:
        """Tokens that an answer to a prompt of this length may have. Raises TooLong if they are fewer than `least`."""
        left = self.longest - prompt
        if left < least:
            limit = self.longest
            raise TooLong(f"the prompt has {prompt} tokens, the model takes {limit} with its answer", "shorten it")
        return left

    def ask(self, *asks: Ask) -> None:
        """Queue requests; their prompts are read together as far as there is room. Raises TooLong."""
        for ask in asks:
            if ask.max_new_tokens > self.room(len(ask.prompt), min(1, ask.max_new_tokens)):
                raise TooLong(f"{ask.width} tokens are more than {self.longest}", "ask for fewer")
        with self._lock:
            self._waiting.extend(asks)
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
        """End every request with an error, if the stepping thread can't continue."""
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
        """Take waiting requests in order, as far as rows, cache and adapters' memory allow."""
        self._drop_cancelled()
        joining: dict[str, list[Row]] = {}
        new: list[Row] = []
        while self._waiting and self.running + len(new) < self._rows:
            ask = self._waiting[0]
            if not self._fits(ask, new):
                break
            try:
                held = self._pool.hold(ask.adapter, ask.folder) if ask.adapter and ask.folder else None
                row = Row(ask, held, self._pool)
            except NoRoom:
                break  # an answer will end and free an adapter
            except LoractlError as error:
                self._next().say(Said(ended="error", error=error.sentence))
                continue
            except Exception as error:
                log.exception("a request failed before it began")
                self._next().say(Said(ended="error", error=failure_sentence(error)))
                continue
            self._next()
            new.append(row)
            joining.setdefault(row.lane, []).append(row)
        try:
            for name, rows in joining.items():
                self._let_in(name, rows)
        except Exception as error:  # as when a card can't even free memory: requests without a lane get it, too
            seated = [row for lane in self._lanes.values() for row in lane.rows]
            for row in new:
                if row not in seated:
                    row.fail(failure_sentence(error))
            raise

    def _let_in(self, name: str, rows: Sequence[Row]) -> None:
        lane = self._lanes.setdefault(name, Lane(self._pool, self._ends))
        for some in _readable(rows):
            # the lane does not change while prompts are read: a failure there ends only the new rows
            read = self._tried(partial(lane.read, some), some)
            if read is not None:
                self._tried(partial(lane.join, some, read), [*lane.rows, *some], lane)
        if not lane.rows:
            del self._lanes[name]

    def _drop_cancelled(self) -> None:
        """Drop requests of callers who have left: they must not count as waiting."""
        with self._lock:
            gone = [ask for ask in self._waiting if ask.cancelled.is_set()]
            for ask in gone:
                self._waiting.remove(ask)
        for ask in gone:
            ask.say(Said(ended="cancelled"))

    def _next(self) -> Ask:
        with self._lock:
            return self._waiting.popleft()

    def _fits(self, ask: Ask, joining: list[Row]) -> bool:
        """Whether the cache holds all rows at their longest, each padded to the widest of its lane, with this one."""
        rows = [*joining, *(row for lane in self._lanes.values() for row in lane.rows)]
        if not rows:
            return True  # alone it fits: `ask` has checked
        widest = max(ask.width, *(row.ask.width for row in rows))
        return (len(rows) + 1) * widest <= self.cache_tokens

    def _tried(self, work: Callable[[], Result], rows: Sequence[Row], lane: Lane | None = None) -> Result | None:
        """Do the work; a failure ends only these rows and empties the lane."""
        rows = list(rows)
        try:
            return work()
        except Exception as error:
            log.exception("%s requests failed", len(rows))
            why = failure_sentence(error)
        except BaseException:  # also a person's Ctrl-C: nothing may be left half-way
            self._end(rows, lane, "interrupted")
            raise
        self._end(rows, lane, why)
        release()  # outside the handler: until it ends, the error's traceback holds the tensors
        return None

    def _end(self, rows: Sequence[Row], lane: Lane | None, why: str) -> None:
        if lane is not None:
            lane.clear()
        for row in rows:
            row.fail(why)


def _readable(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Groups of rows for one pass over their prompts, each padded to the longest of its group. Rows with prompt
    log-probabilities are in groups of their own: they are read in parts."""
    some: list[Row] = []
    for row in sorted(rows, key=lambda row: row.ask.prompt_logprobs):
        widest = max(len(each.ask.prompt) for each in (*some, row))
        other = some and some[0].ask.prompt_logprobs != row.ask.prompt_logprobs
        if other or (some and (len(some) + 1) * widest > READ_TOKENS):
            yield some
            some = []
        some.append(row)
    yield some


def _cache_bytes(pool: AdapterPool) -> int:
    if pool.base.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        own = int(torch.cuda.get_per_process_memory_fraction() * total) - torch.cuda.memory_reserved()
        return int(DEVICE_CACHE_SHARE * max(0, min(free, own) - pool.adapter_memory))
    return HOST_CACHE_BYTES
