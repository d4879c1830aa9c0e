"""Answers for one person: single prompts, or a conversation, with an adapter on a loaded base."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loractl.common.data.fields import tools
from loractl.common.errors import LoractlError, UsageError
from loractl.worker.data.prompt import prompt_for

from .adapter_pool import AdapterPool, BaseChoice, open_pool
from .card import Footprint, take_card
from .decoding.decoder import Decoder
from .decoding.request import Ask, Said
from .library import Library, Listed, same_base

Messages = list[dict[str, Any]]

OTHER_ADAPTERS_BYTES = 2**30
"""Bytes for the adapters that a conversation switches to."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How answers are drawn, and on which card."""

    system: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    gpu: str | None
    tools: Path | None = None  # a file of functions that answers may call

    def read_tools(self) -> list[dict[str, Any]]:
        """The functions in OpenAI's form. Raises UsageError."""
        if self.tools is None:
            return []
        try:
            return list(json.loads(tools(self.tools.read_text("utf-8")) or "[]"))
        except (OSError, ValueError) as error:
            hint = 'a JSON list like [{"name": "disk", "parameters": {"type": "object", ...}}]'
            raise UsageError(f"--tools: {self.tools} can't be read: {error}", hint) from None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to a single prompt."""

    prompt: str
    job_id: int | None  # the job of the adapter that answered; None: the base
    text: str
    ended: str | None
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """A list of: `job_id`, of the adapter, null for the base; `prompt`, `answer`, `ended` (stop or length) and
        `tokens`."""
        return {
            "job_id": self.job_id,
            "prompt": self.prompt,
            "answer": self.text,
            "ended": self.ended,
            "tokens": self.tokens,
        }


@dataclass(kw_only=True)
class PartialAnswer:
    """The answer so far."""

    text: str = ""
    tokens: int = 0
    ended: str | None = None
    error: str | None = None

    def take(self, said: Said) -> None:
        self.text += said.text
        self.tokens, self.ended, self.error = said.tokens, said.ended, said.error

    def check(self) -> None:
        """Raises LoractlError if the answer failed."""
        if self.error:
            raise LoractlError(f"no answer: {self.error}")


def open_conversation(
    library: Library, name: str, style: Style, tell: Callable[[str], None], warn: Callable[[str], None]
) -> Conversation:
    """Load the base of an adapter like its job: in its number format, in NF4 for QLoRA. Raises LoractlError."""
    adapter, known = library.find(name), style.read_tools()
    base, trained = (adapter.spec.base_model, library.revision(adapter)), adapter.arithmetic
    footprint = Footprint.of(base, trained, adapter.size + OTHER_ADAPTERS_BYTES)
    device = take_card(library.settings, library.store, style.gpu, footprint)
    choice = BaseChoice.of(base, trained, device, run_code=library.may_run_code(adapter))
    pool = open_pool(choice, library, [adapter], tell, warn)
    return Conversation(library=library, pool=pool, engine=Decoder(pool), adapter=adapter, style=style, tools=known)


@dataclass(kw_only=True)
class Conversation:
    """A conversation with an adapter on a loaded base."""

    library: Library
    pool: AdapterPool
    engine: Decoder
    adapter: Listed
    style: Style
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: Messages = field(default_factory=list)

    def complete(self, prompts: Sequence[str], *, base: bool, ended: Callable[[int], None]) -> list[Completion]:
        """Answers to single prompts, all at once; `base`: by the base alone. `ended` takes how many are complete.
        Raises LoractlError if one fails."""
        answers = [PartialAnswer() for _ in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            self.engine.ask(self._ask(_asking(self._opening(), prompt), answer.take, base=base))
        while self.engine.step():
            ended(sum(answer.ended is not None for answer in answers))
        for answer in answers:
            answer.check()
        job_id = None if base else self.adapter.job_id
        return [
            Completion(prompt=prompt, job_id=job_id, text=answer.text, ended=answer.ended, tokens=answer.tokens)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def ask(self, messages: Messages, say: Callable[[Said], None], tools: list[dict[str, Any]] | None = None) -> None:
        """Queue a conversation; `say` gets its next answer in pieces as the engine steps. `tools`: instead of the
        conversation's own. Raises UsageError."""
        opening = [] if messages[0]["role"] == "system" else self._opening()
        self.engine.ask(self._ask([*opening, *messages], say, base=False, tools=tools))

    def turn(self, text: str, say: Callable[[str], None]) -> PartialAnswer:
        """Ask one question, and yield the answer as it comes; a stopped answer stays in the conversation as far as it
        got."""
        messages = _asking(self.messages or self._opening(), text)
        answer = self._spoken(messages, say, base=False)
        if not answer.error:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def turn_of_base(self, say: Callable[[str], None]) -> PartialAnswer:
        """Let the base alone answer the last question, to compare. Raises UsageError if there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no question yet", "ask one first")
        return self._spoken(self.messages[:-1], say, base=True)

    def begin_anew(self, system: str = "") -> None:
        """Forget the conversation, and start with the system message if there is one."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def switch(self, name: str) -> float:
        """Continue with another adapter of the same base; returns the seconds that took. Raises LoractlError."""
        other = self.library.find(name)
        same_base([self.adapter, other])
        began = time.monotonic()
        held = self.pool.hold(other, self.library.fetch(other))
        self.pool.switch(held.key)
        self.pool.let_go(held)
        self.adapter = other
        return time.monotonic() - began

    def _opening(self) -> Messages:
        return [{"role": "system", "content": self.style.system}] if self.style.system else []

    def _spoken(self, messages: Messages, say: Callable[[str], None], *, base: bool) -> PartialAnswer:
        """The answer, token by token. Ctrl-C stops it."""
        answer = PartialAnswer()

        def hear(said: Said) -> None:
            answer.take(said)
            say(said.text)

        ask = self._ask(messages, hear, base=base)
        self.engine.ask(ask)
        # not by KeyboardInterrupt, which would interrupt a load or a batch half-way
        before = signal.signal(signal.SIGINT, lambda *_: ask.cancelled.set())
        try:
            self.engine.finish()
        finally:
            signal.signal(signal.SIGINT, before)
        return answer

    def _ask(
        self, messages: Messages, say: Callable[[Said], None], *, base: bool, tools: list[dict[str, Any]] | None = None
    ) -> Ask:
        style = self.style
        format, template = self.library.format(self.adapter), self.adapter.spec.dataset.template
        known = self.tools if tools is None else tools
        ids = prompt_for(format, messages, self.pool.tokenizer, template, known)
        return Ask(
            prompt=ids,
            say=say,
            max_new_tokens=min(style.max_new_tokens, self.engine.room(len(ids))),
            adapter=None if base else self.adapter,
            folder=None if base else self.library.fetch(self.adapter),
            temperature=style.temperature,
            top_p=style.top_p,
            seed=style.seed,
            marks=bool(known),
        )


def _asking(messages: Messages, text: str) -> Messages:
    return [*messages, {"role": "user", "content": text}]
