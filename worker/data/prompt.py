"""From messages to a prompt's token ids: by the chat template where the adapter was trained on conversations, else as
plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from loractl.common.errors import UsageError
from loractl.common.job.sections import DataFormat, PromptTemplate

from .template import templated
from .tokens import without_eos

PLAIN = frozenset({DataFormat.TEXT, DataFormat.PROMPT_COMPLETION})
"""Rows of these formats never saw the chat template, so their adapters' prompts do not either."""

Message = Mapping[str, str]  # role and content


def chat_prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of a conversation, up to where the answer begins. Raises UsageError where the template refuses it."""
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(f"the model's chat template refuses these messages: {error}") from error
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
) -> list[int]:
    """Token ids as an adapter that was trained on this format expects them; of plain formats the last message alone."""
    if format in PLAIN:
        return text_prompt(messages[-1]["content"], tokenizer)
    return chat_prompt(messages, templated(tokenizer, template))
