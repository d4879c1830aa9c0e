"""The part of OpenAI's HTTP API that a base and its adapters can answer: requests read strictly, answers in its form.

Form: https://platform.openai.com/docs/api-reference/chat. A key that would change an answer and isn't supported is
refused, never left out silently. A key that only describes the caller (user, metadata, ...) is ignored.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .request import Said

Ended = Literal["stop", "length"]


class ApiError(Exception):
    """An answer with an HTTP status, in the API's form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """{"error": {...}} as OpenAI's clients expect it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; its content is text, or parts that are all text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(BaseModel):
    include_usage: bool = False


_UNCHANGING: dict[str, Any] = {
    "n": (1, None), "best_of": (1, None), "logprobs": (False, None, 0), "top_logprobs": (0, None), "tools": ([], None),
    "tool_choice": ("none", "auto", None), "functions": ([], None), "function_call": ("none", "auto", None),
    "response_format": ({"type": "text"}, None), "presence_penalty": (0, None), "frequency_penalty": (0, None),
    "logit_bias": ({}, None), "echo": (False, None), "suffix": (None, ""), "modalities": (["text"], None),
}  # fmt: skip
"""Keys that are not supported, with the values that ask for nothing and are let through."""


StopText = Annotated[str, Field(max_length=256)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: _StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _no_more_than_can_be_done(self) -> _Request:
        for key, value in (self.model_extra or {}).items():
            if key in _UNCHANGING and value not in _UNCHANGING[key]:
                raise ValueError(f"{key} is not supported here")
        return self


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str]

    @field_validator("prompt")
    @classmethod
    def _one(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and len(value) != 1:
            raise ValueError("takes one text here")
        return value

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def limit(self) -> int | None:
        return self.max_tokens


class Reply:
    """The answer to one request, whole or in pieces."""

    def __init__(self, model: str, prompt_tokens: int, *, chat: bool) -> None:
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._model, self._prompt, self._chat = model, prompt_tokens, chat
        self._first = True

    def whole(self, text: str, last: Said) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": last.ended, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": self.usage(last)}

    def piece(self, said: Said) -> dict[str, Any]:
        """One event of a stream; the first one names the role."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": said.ended, "logprobs": None}
        if self._chat:
            role = {"role": "assistant"} if self._first else {}
            choice["delta"] = {**role, **({"content": said.text} if said.text or self._first else {})}
        else:
            choice["text"] = said.text
        self._first = False
        return {**self._head("chat.completion.chunk" if self._chat else "text_completion"), "choices": [choice]}

    def last_piece(self, last: Said) -> dict[str, Any]:
        """The event with the usage, for callers who asked for it."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self.usage(last)}

    def usage(self, last: Said) -> dict[str, int]:
        total = self._prompt + last.tokens
        return {"prompt_tokens": self._prompt, "completion_tokens": last.tokens, "total_tokens": total}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
