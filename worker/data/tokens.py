"""From an example to token ids and labels: the chat template, and what is learned.

Loss falls on answers only (on everything for `text`), the end-of-sequence token is learned, and there is one BOS at
most. For a classifier loss falls on a row's label alone, and its text is what the tokenizer makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from loractl.common.data.example import Example
from loractl.common.job.sections import DataFormat

IGNORED = -100
"""The label that cross-entropy leaves out (torch.nn.CrossEntropyLoss's default ignore_index)."""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One tokenised row; `labels` equal `input_ids` where the model learns to go on and IGNORED elsewhere."""

    number: int
    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = ()  # of a packed row: where its second and further examples begin
    label: int | None = None  # of a classifier's row: its place in PreparedData.label_names


def encode(example: Example, tokenizer: Any, format: DataFormat) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one example, untruncated.

    Raises ValueError when the chat template does not render a conversation as a prefix of its continuation, and for a
    text without a token.
    """
    if example.turns:
        return _encode_chat(example, tokenizer)
    if format is DataFormat.CLASSIFICATION:
        ids = list(tokenizer(example.text).input_ids)
        if not ids:
            raise ValueError("has a text that the model's tokenizer turns into no token")
        return ids, [IGNORED] * len(ids)
    return _encode_text(example, tokenizer, learn_all=format is DataFormat.TEXT)


def _encode_chat(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Render the whole conversation once, and learn the characters of each answer up to its end-of-sequence token."""
    last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
    text = _render(example, last + 1, tokenizer)
    spans = []
    for place, turn in enumerate(example.turns[: last + 1]):
        if turn.role != "assistant":
            continue
        before = _render(example, place, tokenizer, generation_prompt=True)
        after = _render(example, place + 1, tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError("the model's chat template changes earlier turns, so answers can't be told from the rest")
        # stripped, as many templates have it: the end is looked for behind what they keep at the least
        eos = after.find(tokenizer.eos_token, len(before) + len(turn.content.strip()))
        spans.append((len(before), len(after) if eos < 0 else eos + len(tokenizer.eos_token)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), encoded.offset_mapping
    learned = [any(start <= a and b <= end for start, end in spans) and a < b for a, b in offsets]
    labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
    if text.find(tokenizer.eos_token, spans[-1][0]) < 0:  # the template has no end: teach one
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def _encode_text(example: Example, tokenizer: Any, *, learn_all: bool) -> tuple[list[int], list[int]]:
    """Prompt and completion are tokenised as one text: a token that crosses the border counts as prompt."""
    encoded = tokenizer(example.text, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), list(encoded.offset_mapping)
    trimmed = without_eos(ids, tokenizer)
    labels = [
        token if a < b and (learn_all or a >= len(example.prompt)) else IGNORED
        for token, (a, b) in zip(trimmed, offsets[: len(trimmed)], strict=True)
    ]
    return [*trimmed, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def prompt_of(example: Example, tokenizer: Any) -> tuple[list[int], str, str] | None:
    """(prompt ids, prompt for people, expected answer) of the example's last answer; None for plain text."""
    if example.turns:
        last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
        rendered = _render(example, last, tokenizer, generation_prompt=True)
        shown = (
            example.turns[last - 1].content
            if last == 1
            else "\n".join(f"{t.role}: {t.content}" for t in example.turns[:last])
        )
        return tokenizer(rendered, add_special_tokens=False).input_ids, shown, example.turns[last].content
    if example.prompt:
        return (
            without_eos(tokenizer(example.prompt).input_ids, tokenizer),
            example.prompt,
            example.text[len(example.prompt) :],
        )
    return None


def rendered(example: Example, tokenizer: Any) -> str:
    """A conversation as the chat template writes it, up to its last answer. Raises ValueError where it refuses it."""
    last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
    return _render(example, last + 1, tokenizer)


def _render(example: Example, end: int, tokenizer: Any, *, generation_prompt: bool = False) -> str:
    messages = [{"role": t.role, "content": t.content} for t in example.turns[:end]]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:  # what a template raises by itself, like "System role not supported"
        raise ValueError(f"the model's chat template refuses it: {error}") from error
    return text


def without_eos(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Some tokenizers close every text themselves; the end is added once, later."""
    kept = list(ids)
    while len(kept) > 1 and kept[-1] == tokenizer.eos_token_id:
        kept.pop()
    return kept
