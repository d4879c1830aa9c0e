"""The tokenizer with the template that a job asks for, instead of the model's own."""

from __future__ import annotations

import copy
from typing import Any

from loractl.common.data.formats import INPUT
from loractl.common.job.sections import PromptTemplate

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


def templated(tokenizer: Any, template: PromptTemplate) -> Any:
    """The tokenizer itself, or a copy if the template is not the model's own."""
    if template is PromptTemplate.CHAT:
        return tokenizer
    changed = copy.copy(tokenizer)
    # rendered conversations are tokenised without special tokens: the template adds the BOS if one is usual
    usual_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    changed.chat_template = ("{{ bos_token }}" if usual_bos else "") + ALPACA
    return changed
