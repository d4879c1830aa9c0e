"""Answers held to a form: JSON by a schema, token by token, by llguidance (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from loractl.common.errors import UsageError

from .tool_calls import CallForm

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
                self._words = self._read()
        matcher = LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the schema can't be kept: {first_line(matcher.get_error())}")
        return AnswerGrammar(matcher)

    def _read(self) -> Any:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, eos_token=self._ends)
        except ValueError as error:
            raise UsageError(f"this base's tokenizer can't hold answers to a form: {first_line(str(error))}") from None


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
