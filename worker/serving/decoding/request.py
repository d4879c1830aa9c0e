"""A request for one answer: what is asked, and its text as it comes, token by token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from loractl.worker.serving.adapter_pool import BASE, AdapterPool, Loaded
from loractl.worker.serving.library import Listed

from .grammar import AnswerGrammar, overlap
from .logprobs import TokenLogprob, score

Ending = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Said:
    """A request's output in this step: settled text, and at the end why it ended."""

    text: str = ""
    tokens: int = 0  # generated so far
    ended: Ending | None = None
    error: str | None = None
    refused: bool = False  # the error is the request's own
    scored: tuple[TokenLogprob, ...] = ()  # tokens since the previous piece, if their log-probabilities are requested


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request for one answer."""

    prompt: Sequence[int]
    say: Callable[[Said], None]  # called by the thread that steps
    max_new_tokens: int  # 0: only the prompt's log-probabilities
    adapter: Listed | None = None  # None: the base alone
    folder: Path | None = None  # the adapter's files
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    form: AnswerGrammar | None = None  # what constrains the answer
    logprobs: int | None = None  # of each token, and of this many likeliest ones; None: none
    prompt_logprobs: bool = False  # those of the prompt's tokens, too
    marks: bool = False  # whether the text includes the tokenizer's special tokens: those of a tool call may be such
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def width(self) -> int:
        """The most tokens it may have."""
        return len(self.prompt) + self.max_new_tokens


class Row:
    """One request while it is answered."""

    def __init__(self, ask: Ask, held: Loaded | None, pool: AdapterPool) -> None:
        self.ask = ask
        self.last = -1
        self.over = False
        self.key = BASE if held is None else held.key
        self.lane = "" if held is None or held.mixes else held.key
        self._held = held
        self._pool = pool
        self._text = TextStream(pool.tokenizer, ask.stop, marks=ask.marks)
        self._tokens = 0
        self._scored: list[TokenLogprob] = []
        self._random: torch.Generator | None = None

    def score_prompt(self, logits: torch.Tensor, begin: int) -> None:
        """Take the log-probabilities of the prompt's tokens that follow the logits' positions, starting at `begin`."""
        if begin == 0:
            self._scored.append(TokenLogprob(self.ask.prompt[0], None))
        tokens = self.ask.prompt[begin + 1 : begin + 1 + len(logits)]
        if tokens:
            self._scored += score(logits[: len(tokens)], tokens, self.ask.logprobs or 0)

    def choose(self, logits: torch.Tensor, likeliest: int) -> int:
        """The next token: the likeliest or a drawn one; for a constrained answer, among those that keep its form."""
        form, greedy = self.ask.form, self.ask.temperature == 0
        if form is None:
            token = likeliest if greedy else self.draw(logits)
        else:
            held = form.hold(logits)
            token = int(held.argmax()) if greedy else self.draw(held)
            form.take(token)
        if self.ask.logprobs is not None:
            self._scored += score(logits[None], [token], self.ask.logprobs)
        return token

    def draw(self, logits: torch.Tensor) -> int:
        """A token by temperature and nucleus (top-p, arXiv:1904.09751) of those that top-k and min-p (arXiv:2407.01082)
        leave. It is drawn on the CPU, so that a seed draws the same on every device."""
        if self._random is None:
            self._random = torch.Generator()
            if self.ask.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(self.ask.seed)
        # the largest is subtracted first: with a tiny temperature it would become infinite
        shares = torch.softmax((logits - logits.max()).double() / self.ask.temperature, -1).cpu()
        if self.ask.min_p:
            shares = shares * (shares >= self.ask.min_p * shares.max())
        if 0 < self.ask.top_k < len(shares):
            shares = shares * (shares >= shares.topk(self.ask.top_k).values[-1])
        if self.ask.top_p >= 1:
            return int(torch.multinomial(shares, 1, generator=self._random))
        shares, order = (shares / shares.sum()).sort(descending=True)
        inside = shares.cumsum(-1) - shares < self.ask.top_p
        return int(order[torch.multinomial(shares * inside, 1, generator=self._random)])

    def take(self, token: int, *, ended: bool) -> None:
        """Take the next token; `ended`: it ends the answer."""
        self.last = token
        self._tokens += 1
        if ended:
            self.end("stop")
            return
        text, stopped = self._text.add(token)
        if stopped:
            self._close("stop", text)
        elif self.ask.form is not None and self.ask.form.complete:
            self._close("stop", text + self._text.rest())
        elif self._tokens >= self.ask.max_new_tokens:
            self._close("length", text + self._text.rest())
        elif text:
            self._tell(text)

    def end(self, why: Ending) -> None:
        self._close(why, self._text.rest())

    def fail(self, why: str, *, refused: bool = False) -> None:
        """End with an error; `refused`: the request's own."""
        if not self.over:
            self._let_go()
            self.ask.say(Said(tokens=self._tokens, ended="error", error=why, refused=refused))

    def _close(self, why: Ending, text: str) -> None:
        self._let_go()
        self._tell(text, why)

    def _tell(self, text: str, why: Ending | None = None) -> None:
        scored, self._scored = tuple(self._scored), []
        self.ask.say(Said(text=text, tokens=self._tokens, ended=why, scored=scored))

    def _let_go(self) -> None:
        self.over = True
        if self._held is not None:
            self._pool.let_go(self._held)


class TextStream:
    """Tokens to text as they come: a partial character is held back, and so is a possible start of a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], *, marks: bool = False) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._begin = self._told = 0  # text up to `told` has been returned; decoding starts a little before it
        self._pending = ""

    def add(self, token: int) -> tuple[str, bool]:
        """(text that is settled, whether a stop text came)."""
        self._ids.append(token)
        before, now = self._decode(self._begin, self._told), self._decode(self._begin, None)
        if len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
            self._begin, self._told = self._told, len(self._ids)
            self._pending += now[len(before) :]
        stops = [place for text in self._stop if (place := self._pending.find(text)) >= 0]
        if stops:
            return self._pending[: min(stops)], True
        held = max((overlap(self._pending, text) for text in self._stop), default=0)
        settled = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(settled) :]
        return settled, False

    def rest(self) -> str:
        """The text still held back."""
        before, now = self._decode(self._begin, self._told), self._decode(self._begin, None)
        self._told = len(self._ids)
        return self._pending + now[len(before) :]

    def _decode(self, begin: int, end: int | None) -> str:
        text: str = self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=not self._marks)
        return text
