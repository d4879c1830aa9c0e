"""Tool calls in answers: parsed from the text if the chat template's form of a call is known, and constrained to it if
a call is required. In any other form a call stays text."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
