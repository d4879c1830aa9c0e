"""From messages to a prompt's token ids: by the chat template if the adapter was trained on conversations, else as
plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loractl.common.errors import UsageError
from loractl.common.job.sections import DataFormat, PromptTemplate

from .template import templated
from .tokens import render, without_eos

PLAIN = frozenset({DataFormat.TEXT, DataFormat.PROMPT_COMPLETION, DataFormat.PREFERENCE_TEXT})
"""Rows of these formats never saw the chat template, so their adapters' prompts do not either."""

Message = Mapping[str, Any]  # role and content, and anything else that the template reads


def chat_prompt(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] = (), more: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a conversation, up to where the answer begins. `more`: the template's own variables.

    Raises UsageError if the template refuses it, or has no place for the tools.
    """
    try:
        text = render(messages, tokenizer, tools, more, generation_prompt=True)
        if tools and text == render(messages, tokenizer, (), more, generation_prompt=True):
            raise UsageError("the model's chat template has no place for tools")
    except ValueError as error:
        raise UsageError(str(error).replace("refuses it", "refuses these messages")) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def text_prompt(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text to continue. Raises UsageError for an empty text without tokens."""
    ids = without_eos(tokenizer(text).input_ids, tokenizer)
    if not ids:
        raise UsageError("the prompt is empty")
    return ids


def prompt_for(
    format: DataFormat,
    messages: Sequence[Message],
    tokenizer: Any,
    template: PromptTemplate = PromptTemplate.CHAT,
    tools: Sequence[Any] = (),
    more: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids as an adapter trained on this format expects them; for plain formats only the last message."""
    if format in PLAIN:
        if tools:
            raise UsageError(f"the adapter was trained on {format.value} rows, which have no tools")
        return text_prompt(messages[-1]["content"], tokenizer)
    return chat_prompt(messages, templated(tokenizer, template), tools, more)
