"""Forms of answers: JSON by a schema, and tool calls. An answer is held to its form token by token, by llguidance
(https://github.com/guidance-ai/llguidance). Calls are parsed from the text if the chat template's form of a call is
known; in any other form a call stays text.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loractl.common.errors import UsageError

ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""The schema of json_object."""

MOST_LETTERS = 32 * 1024
"""Characters of a schema as JSON: a larger one would take seconds to parse, in a thread that others wait for."""

SPACES = r"[\x20\x0A\x0D\x09]{1,16}"
"""What may come between two parts: without a limit, a model that likes spaces writes nothing else."""


class AnswerGrammar:
    """How one answer may continue. Raises UsageError for a schema whose beginning can't be met."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._mask()

    def copy(self) -> AnswerGrammar:
        """A copy of the form's current state, for another answer."""
        return AnswerGrammar(self._matcher.deep_copy())

    def hold(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the next token (one row), with -inf for tokens that would break the form. Raises UsageError."""
        bits = np.frombuffer(self._mask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))[: len(logits)]
        allowed = torch.nn.functional.pad(allowed, (0, len(logits) - len(allowed)))
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Take the chosen token. Raises UsageError."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _mask(self) -> bytes:
        bits: bytes = self._matcher.compute_bitmask()
        self._check()
        return bits

    def _check(self) -> None:
        """Errors that the library does not find when it parses a schema, it raises when an answer gets there."""
        if self._matcher.is_error():
            why = "it names itself, or has hundreds of optional properties"
            raise UsageError(f"the schema can't be kept: {why} ({first_line(self._matcher.get_error())})")


class GrammarCompiler:
    """Makes forms for a base's tokens. For any thread."""

    def __init__(self, tokenizer: Any, ends: Iterable[int]) -> None:
        self._tokenizer, self._ends = tokenizer, sorted(ends)
        self._lock = threading.Lock()
        self._words: Any = None  # llguidance's tokenizer: created once, in about a second

    def of(self, schema: dict[str, Any]) -> AnswerGrammar:
        """JSON by a schema, for one answer. Raises UsageError for a schema that can't be met."""
        matcher = _matcher("response_format")
        written = json.dumps(schema)
        self._check_size(written)
        try:
            grammar = matcher.grammar_from_json_schema(written, overrides={"whitespace_pattern": SPACES})
        except ValueError as error:
            raise UsageError(f"the schema can't be kept: {first_line(str(error))}") from None
        return self._form(grammar)

    def of_call(self, form: CallForm, tools: Sequence[Mapping[str, Any]]) -> AnswerGrammar:
        """A call of one of the tools, for one answer. Raises UsageError."""
        matcher = _matcher("tool_choice")
        marks = self._tokenizer.all_special_tokens
        grammar = form.grammar(tools, dict(zip(marks, self._tokenizer.convert_tokens_to_ids(marks), strict=True)))
        self._check_size(grammar)
        return self._form(matcher.grammar_from_lark(grammar))

    def _check_size(self, written: str) -> None:
        if len(written) > MOST_LETTERS:
            raise UsageError(f"the schema has {len(written)} letters, {MOST_LETTERS} are the most")

    def _form(self, grammar: str) -> AnswerGrammar:
        from llguidance import LLMatcher

        with self._lock:
            if self._words is None:
                from llguidance.hf import from_tokenizer

                try:
                    self._words = from_tokenizer(self._tokenizer, eos_token=self._ends)
                except ValueError as error:
                    what = f"this base's tokenizer can't hold answers to a form: {first_line(str(error))}"
                    raise UsageError(what) from None
        matcher = LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the schema can't be kept: {first_line(matcher.get_error())}")
        return AnswerGrammar(matcher)


def _matcher(what: str) -> Any:
    """llguidance's matcher. Raises UsageError if it is missing."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise UsageError(f"{what} needs llguidance here", "pip install 'loractl[serve]'") from None
    return LLMatcher


def first_line(text: str) -> str:
    """A library's message, short enough for an answer."""
    return next(iter(text.strip().splitlines()), "it does not say why")[:300]


Call = dict[str, Any]  # {"id", "type": "function", "function": {"name", "arguments": JSON text}}, as OpenAI has it


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a family of models writes calls: `begin`, a call or a list of calls as JSON, `end`."""

    begin: str
    end: str
    arguments: str  # the key of the arguments, next to the name
    listed: bool = False

    def grammar(self, tools: Sequence[Mapping[str, Any]], special: Mapping[str, int]) -> str:
        """One call of one of the tools, for llguidance. `special`: the tokenizer's special tokens, with their ids."""
        functions = [tool["function"] for tool in tools]
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    self.arguments: function.get("parameters") or {"type": "object"},
                },
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for function in functions
        ]
        call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if self.listed else call
        call["x-guidance"] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as tojson
        begin, end = (_in_lark(mark, special) for mark in (self.begin, self.end))
        line = r" /\n?/ " if self.end else " "
        return f"start: {begin}{line}call{line}{end}\ncall: %json {json.dumps(call)}\n"


def _in_lark(mark: str, special: Mapping[str, int]) -> str:
    if not mark:
        return ""
    return f"<[{special[mark]}]>" if mark in special else json.dumps(mark)


HERMES = CallForm(begin="<tool_call>", end="</tool_call>", arguments="arguments")
MISTRAL = CallForm(begin="[TOOL_CALLS]", end="", arguments="arguments", listed=True)
LLAMA = CallForm(begin="", end="", arguments="parameters")


def form_of(template: str) -> CallForm | None:
    """The form of calls in a chat template; None: it is unknown here."""
    if HERMES.begin in template and '"arguments"' in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    if "ipython" in template and '"parameters"' in template:
        return LLAMA
    return None


class CallReader:
    """Separates calls from text as an answer comes: a possible start of a call is held back until that is certain."""

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._held = ""
        self._begun = False
        self._told = False

    def add(self, text: str) -> str:
        """Text that is not part of a call."""
        self._held += text
        if self._begun:
            return ""
        if not self._form.begin:  # a whole answer is a call, or is not
            start = self._held.lstrip()[:1]
            self._begun = start == "{" and not self._told
            self._told = self._told or bool(start)
            return self._settle(len(self._held)) if self._told and not self._begun else ""
        place = self._held.find(self._form.begin)
        self._begun = place >= 0
        return self._settle(place if self._begun else len(self._held) - overlap(self._held, self._form.begin))

    def end(self) -> tuple[str, list[Call]]:
        """The remaining text, and the calls. Anything not in the form is text."""
        calls = list(self._calls()) if self._begun else []
        return ("", calls) if calls else (self._held, [])

    def _settle(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _calls(self) -> Iterator[Call]:
        form = self._form
        if form.begin and form.end:
            parts = [part.partition(form.end)[0] for part in self._held.split(form.begin)[1:]]
        else:
            parts = [self._held.removeprefix(form.begin)]
        found = []
        for part in parts:
            try:
                said = json.loads(part)
            except ValueError:
                return
            found += said if form.listed and isinstance(said, list) else [said]
        for one in found:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                return
            if not isinstance(one.get(form.arguments, {}), dict):
                return
        for one in found:
            arguments = json.dumps(one.get(form.arguments, {}), ensure_ascii=False)
            identity = one["id"] if isinstance(one.get("id"), str) else f"call_{uuid.uuid4().hex[:24]}"
            yield {"id": identity, "type": "function", "function": {"name": one["name"], "arguments": arguments}}


def overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that begin the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
