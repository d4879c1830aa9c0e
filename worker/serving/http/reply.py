"""The answer to a request in the form of OpenAI's API, whole or in pieces: its choices as they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from loractl.worker.serving.decoding.grammar import Call, CallReader
from loractl.worker.serving.decoding.logprobs import TextForm, TokenLogprob, TokenTexts, chat_form
from loractl.worker.serving.decoding.request import Said


class ReplyChoice:
    """One of a request's answers. Each read returns what is new since the last.

    `text`: its beginning, an echoed prompt. `texts`: if log-probabilities are requested.
    """

    def __init__(
        self, index: int, *, reader: CallReader | None = None, texts: TokenTexts | None = None, text: str = ""
    ):
        self.index, self.tokens = index, 0
        self._reader, self._texts = reader, texts
        self._form = None if texts is None else TextForm(texts)
        self._text, self._told = text, 0
        self._scored: list[TokenLogprob] = []
        self._calls: list[Call] = []
        self._ended: str | None = None
        self._first = True

    def take(self, said: Said) -> None:
        """Take its next piece."""
        self._text += said.text if self._reader is None else self._reader.add(said.text)
        self._scored += said.scored
        self.tokens = said.tokens
        if said.ended is None:
            return
        if self._reader is not None:
            left, self._calls = self._reader.end()
            self._text += left
        self._ended = "tool_calls" if self._calls else said.ended

    @property
    def news(self) -> bool:
        """Whether there is something to read: text that may be a call does not count yet."""
        return self._ended is not None or len(self._text) > self._told

    def chat(self) -> dict[str, Any]:
        """As in a chat completion."""
        text = self._new()
        said = {"content": text.strip() or None, "tool_calls": self._calls} if self._calls else {"content": text}
        message = {"role": "assistant", **said, "refusal": None}
        return {"index": self.index, "message": message, **self._chat_end()}

    def chat_piece(self) -> dict[str, Any]:
        """As in an event of a chat completion; the first names the role."""
        first, text = self._first, self._new()
        role = {"role": "assistant"} if first else {}
        called = {"tool_calls": [{"index": n, **call} for n, call in enumerate(self._calls)]} if self._calls else {}
        delta = {**role, **({"content": text} if text or first else {}), **called}
        return {"index": self.index, "delta": delta, **self._chat_end()}

    def completion(self) -> dict[str, Any]:
        """As in a completion and its events."""
        scored, self._scored = self._scored, []
        form = None if self._form is None else self._form.part(scored, self._text)
        return {"index": self.index, "text": self._new(), "finish_reason": self._ended, "logprobs": form}

    def _new(self) -> str:
        begin, self._told, self._first = self._told, len(self._text), False
        return self._text[begin:]

    def _chat_end(self) -> dict[str, Any]:
        scored, self._scored = self._scored, []
        return {
            "finish_reason": self._ended,
            "logprobs": None if self._texts is None else chat_form(scored, self._texts),
        }


class Reply:
    """The body around the choices, or that of each event."""

    def __init__(self, model: str, prompt_tokens: int, choices: Sequence[ReplyChoice], *, chat: bool) -> None:
        self.choices = choices
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._model, self._prompt, self._chat = model, prompt_tokens, chat

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [choice.chat() if self._chat else choice.completion() for choice in self.choices]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    def piece(self, choice: ReplyChoice) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._event(), "choices": [choice.chat_piece() if self._chat else choice.completion()]}

    def last_piece(self) -> dict[str, Any]:
        """The event with the usage, for callers that asked for it."""
        return {**self._event(), "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        said = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self._prompt, "completion_tokens": said, "total_tokens": self._prompt + said}

    def _event(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self._chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
