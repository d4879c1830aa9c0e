"""The part of OpenAI's HTTP API that a base and its adapters can answer: requests read strictly, answers in its form.

Form: https://platform.openai.com/docs/api-reference/chat. A key that would change an answer and isn't supported is
refused, never ignored silently, and so is an unknown key. A key that only describes the caller (user, metadata, ...) is
ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loractl.common.data.examples import Turn
from loractl.common.data.fields import tool_calls, tools
from loractl.common.text import slip_of
from loractl.worker.serving.decoding.grammar import ANY_OBJECT

MOST_CHOICES = 128
"""Answers that one request may ask for: its prompts times n."""

MOST_LIKELY = 20
"""The most likeliest tokens per position that may be asked for."""

_CODES = {
    400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "request_timeout", 413: "request_too_large", 415: "unsupported_media_type", 499: "client_closed_request",
    503: "server_unavailable",
}  # fmt: skip
"""Codes by status, for errors without a more specific code."""


class ApiError(Exception):
    """A response with an HTTP status, in the API's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        again_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.headers = {} if again_s is None else {"retry-after": str(again_s)}
        self.code = code or _CODES.get(status, "server_error")

    def body(self) -> dict[str, Any]:
        """{"error": {...}} as OpenAI's clients expect it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; its content is text, or parts that are all text."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None  # null with tool calls
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        """A plain sentence instead of one for each kind that content may have."""
        if isinstance(value, str) or value is None:
            return value
        if not isinstance(value, list):
            raise ValueError("must be text, or a list of parts that are text")
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"holds a part of the kind {str(kind)[:40]!r}; the models here read text alone")
        return value

    @model_validator(mode="after")
    def _nothing_else(self) -> Message:
        for key, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, ""):
                what = f"{key[:64]} of a message is not supported here: a message is its role, its text and its calls"
                raise ApiError(400, what, code="unsupported_parameter", param="messages")
        if self.content is None and not self.tool_calls:
            raise ValueError("has no content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("has tool_calls, which are the assistant's")
        return self

    def turn(self) -> Turn:
        """In the form of a data row. Raises ApiError for an invalid call."""
        parts = self.content if isinstance(self.content, list) else [_Part(type="text", text=self.content or "")]
        try:
            calls = tool_calls(self.tool_calls) if self.tool_calls else ""
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None
        return Turn(
            role="system" if self.role == "developer" else self.role,
            content="".join(part.text for part in parts),
            thought=self.reasoning_content or "",
            calls=calls,
            name=(self.name or "") if self.role == "tool" else "",
            call_id=self.tool_call_id or "",
        )


class _StreamOptions(BaseModel):
    include_usage: bool = False


_UNCHANGING: dict[str, Any] = {
    "best_of": (1, None), "top_logprobs": (0, None), "functions": ([], None), "function_call": ("none", "auto", None),
    "repetition_penalty": (1, None), "presence_penalty": (0, None), "frequency_penalty": (0, None),
    "logit_bias": ({}, None), "echo": (False, None), "suffix": (None, ""), "modalities": (["text"], None),
}  # fmt: skip
"""Unsupported keys, with the values that ask for nothing and are accepted."""

_DESCRIBING = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "prediction",
})  # fmt: skip
"""Keys that describe the caller, or how fast an answer should come: they change no answer, and are ignored."""


_REASONS = {"functions": "functions is not supported here: write them as tools"}

_FORMS = {"text": (), "json_object": (), "json_schema": ("json_schema",)}
_SCHEMA_KEYS = ("name", "schema", "strict", "description")

StopText = Annotated[str, Field(max_length=256)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    @field_validator("response_format")
    @classmethod
    def _known_form(cls, form: dict[str, Any] | None) -> dict[str, Any] | None:
        """Raises ApiError for a response_format that OpenAI does not have."""

        def wrong(what: str, param: str = "") -> ApiError:
            return ApiError(400, f"response_format{param} {what}", param=f"response_format{param}")

        if form is None:
            return None
        kind = form.get("type")
        if kind not in _FORMS:
            raise wrong(f"must be one of {', '.join(_FORMS)}", ".type")
        if others := sorted(form.keys() - {"type", *_FORMS[kind]}):
            raise wrong(f"has a key {others[0][:64]}, which {kind} does not know")
        if kind != "json_schema":
            return form
        asked = form.get("json_schema")
        if not isinstance(asked, dict) or not isinstance(asked.get("schema"), dict):
            raise wrong("must have an object schema", ".json_schema")
        if others := sorted(asked.keys() - {*_SCHEMA_KEYS}):
            raise wrong(f"has a key {others[0][:64]}; known are {', '.join(_SCHEMA_KEYS)}", ".json_schema")
        return form

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """What constrains the answer; None: nothing."""
        asked = self.response_format or {}
        if asked.get("type") == "json_object":
            return ANY_OBJECT
        schema: dict[str, Any] | None = asked["json_schema"]["schema"] if asked.get("type") == "json_schema" else None
        return schema

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def each(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def echoed(self) -> bool:
        """Whether the answer begins with its prompt."""
        return False

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _no_more_than_can_be_done(self) -> _Request:
        known = {*type(self).model_fields, *_UNCHANGING, *_DESCRIBING}
        for key, value in (self.model_extra or {}).items():
            if key in _UNCHANGING:
                if value not in _UNCHANGING[key]:
                    what = _REASONS.get(key, f"{key} is not supported here")
                    raise ApiError(400, what, code="unsupported_parameter", param=key)
            elif key not in _DESCRIBING and (close := slip_of(key, known)):  # the response's header names the rest
                what = f"{key[:64]} is not known here; did you mean {close}?"
                raise ApiError(400, what, code="unknown_parameter", param=key[:64])
        return self

    @property
    def unused(self) -> list[str]:
        """Unknown keys: they change no answer."""
        return [key for key in self.model_extra or {} if key not in _UNCHANGING and key not in _DESCRIBING]


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)

    @model_validator(mode="after")
    def _of_what(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def likely(self) -> int | None:
        """The number of likeliest tokens to report with each token's log-probability; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @field_validator("tools")
    @classmethod
    def _functions(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return json.loads(tools(value)) if value else None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse what the template gets another way."""
        if taken := sorted(
            {"messages", "tools", "tokenize", "add_generation_prompt", "chat_template"} & (value or {}).keys()
        ):
            raise ValueError(f"must not hold {taken[0]}")
        return value

    @property
    def demanded(self) -> list[dict[str, Any]]:
        """The tools, one of which must be called; empty: none must. Raises ApiError for an unknown tool."""
        if self.tool_choice == "required":
            if not self.tools:
                raise ApiError(400, "tool_choice requires a call, and there are no tools", param="tool_choice")
            return self.tools
        if not isinstance(self.tool_choice, dict):
            return []
        function = self.tool_choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        found = [tool for tool in self.tools or () if tool["function"]["name"] == name]
        if not found:
            raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
        return found

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_key(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"


class TextRequest(_Request):
    """POST /v1/completions."""

    prompt: list[str | list[int]]  # as stored; a request may give a single one
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    best_of: int | None = Field(None, ge=1)

    @field_validator("prompt", mode="plain")  # pydantic's own check of such a union takes seconds for a long one
    @classmethod
    def _several(cls, value: Any) -> list[str | list[int]]:
        prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
        if not isinstance(prompts, list) or not all(isinstance(one, str) or _is_tokens(one) for one in prompts):
            raise ValueError("must be a text, a list of token ids, or a list of such")
        return prompts

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_flag(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("must be a whole number here: how many of the likeliest tokens are told")
        return None if value is False else value

    @model_validator(mode="after")
    def _as_many_as_can_be(self) -> TextRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1 where echo is not set", param="max_tokens")
        most = len(self.prompt) * self.each
        if most > MOST_CHOICES or not most:
            what = f"{len(self.prompt)} prompts with n {self.each} are {most} answers; from 1 to {MOST_CHOICES} can be"
            raise ApiError(400, what, param="prompt")
        # repeated draws are the same at temperature 0
        if self.best_of not in (None, self.each) and (self.temperature != 0 or self.best_of < self.each):
            raise ApiError(400, f"best_of must be n ({self.each}) here: all answers are given", param="best_of")
        return self

    @property
    def echoed(self) -> bool:
        return bool(self.echo)

    @property
    def likely(self) -> int | None:
        """The number of likeliest tokens to report with each token's log-probability; None: no log-probabilities."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def limit_key(self) -> str:
        return "max_tokens"


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


class TokenizeRequest(BaseModel):
    """POST /tokenize, as in vLLM. The model does not matter: all have the base's tokenizer."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize, as in vLLM."""

    model_config = ConfigDict(extra="forbid")

    tokens: list[int]
    model: str | None = None


def refusal(error: ValidationError) -> ApiError:
    """The first error in a body, in plain words, with its key."""
    found = error.errors(include_url=False)
    about = _path(found[0]["loc"])
    # for a value that may have several kinds, the error for its actual kind says more
    first = next((e for e in found if _path(e["loc"]) == about and not e["type"].endswith("_type")), found[0])
    param = _path(first["loc"])
    kind, facts = first["type"], first.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {facts.get('error', 'it ends too soon')}", code="invalid_json")
    if kind == "missing":
        return ApiError(400, f"{param} is missing", code="missing_required_parameter", param=param)
    if kind in _WORDS:
        words = _WORDS[kind].format(**facts)
    elif kind == "value_error":
        words = str(facts.get("error"))
    else:
        words = f"is not what it should be ({first['msg']})"
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return ApiError(400, f"{param or 'the body'} {words}", code=code, param=param)


_WORDS = {
    "string_type": "must be text", "list_type": "must be a list", "int_type": "must be a whole number",
    "int_parsing": "must be a whole number", "int_from_float": "must be a whole number",
    "float_type": "must be a number", "float_parsing": "must be a number", "bool_type": "must be true or false",
    "bool_parsing": "must be true or false", "model_type": "must be an object", "dict_type": "must be an object",
    "model_attributes_type": "must be an object", "finite_number": "must be a finite number",
    "literal_error": "must be one of {expected}", "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}", "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}", "string_too_long": "has more than {max_length} letters",
    "extra_forbidden": "is not known here",
    "too_long": "has more than {max_length} parts", "too_short": "needs at least {min_length}",
}  # fmt: skip
"""pydantic's kinds of errors as the text after the key's name."""


def _path(places: tuple[int | str, ...]) -> str | None:
    """messages[0].role, without what pydantic adds about a value's possible kinds."""
    path = ""
    for place in places:
        if isinstance(place, int):
            path += f"[{place}]"
        elif place.isidentifier() and place not in ("str", "int", "list"):
            path += f".{place}" if path else place
    return path or None
