"""From messages to a prompt's token ids: by the chat template if the adapter was trained on conversations, else as
plain text. A job's own template replaces the model's.
"""

from __future__ import annotations

import copy
import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loractl.common.data.formats import INPUT
from loractl.common.errors import UsageError
from loractl.common.job.sections import DataFormat, PromptTemplate

from .tokens import render, without_eos

_TASK = "Below is an instruction that describes a task"
_FURTHER = ", paired with an input that provides further context"
_ANSWER = "Write a response that appropriately completes the request."

ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    f"{{% elif {INPUT!r} in messages[0]['content'] %}}{_TASK}{_FURTHER}. {_ANSWER}{{% else %}}{_TASK}. {_ANSWER}"
    "{% endif %}{{ '\\n\\n' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% elif not loop.first or message['role'] != 'system' %}"
    "{{ raise_exception('the alpaca template has no place for the role ' + message['role']) }}"
    "{% endif %}{% endfor %}"
)
"""The prompts of Stanford Alpaca, as Axolotl's `type: alpaca` writes them; an answer ends with the end of sequence."""


def templated(tokenizer: Any, template: PromptTemplate, day: dt.date | None = None) -> Any:
    """The tokenizer itself, or a copy if the template is not the model's own, or asks for the date: `day` is what it is
    told then. None: that of each moment, as a model is asked when it is served."""
    if template is PromptTemplate.CHAT:
        return tokenizer if day is None else _dated(tokenizer, day)
    changed = copy.copy(tokenizer)
    # rendered conversations are tokenised without special tokens: the template adds the BOS if one is usual
    usual_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    changed.chat_template = ("{{ bos_token }}" if usual_bos else "") + ALPACA
    return changed


_ASKS_THE_DATE = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")


def _dated(tokenizer: Any, day: dt.date) -> Any:
    def told(template: str) -> str:
        return _ASKS_THE_DATE.sub(lambda call: json.dumps(day.strftime(call[2])), template)

    own = tokenizer.chat_template
    fixed = {name: told(one) for name, one in own.items()} if isinstance(own, dict) else told(own)
    if fixed == own:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = fixed
    return changed


def today() -> dt.date:
    """In UTC, as a job's day is."""
    return dt.datetime.now(dt.UTC).date()


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
