"""From an example to token ids and labels: the chat template, and what is learned.

Loss falls on answers only (on everything for `text`), the end-of-sequence token is learned, and there is one BOS at
most. For a classifier loss falls on a row's label alone, and its text is what the tokenizer makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from loractl.common.data.example import Example, Turn
from loractl.common.job.sections import DataFormat

APART = "since the model's chat template changes earlier turns"
"""Why a conversation has several rows."""

IGNORED = -100
"""The label that cross-entropy leaves out (torch.nn.CrossEntropyLoss's default ignore_index)."""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One tokenised row; `labels` equal `input_ids` where the model learns to go on and IGNORED elsewhere."""

    number: int  # of the example: rows of one conversation have the same, and follow each other
    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = ()  # of a packed row: where its second and further examples begin
    label: int | None = None  # of a classifier's row: its place in PreparedData.label_names


def teaches(row: TokenRow) -> bool:
    """Whether anything of it is learned: its first token has no context to be predicted from."""
    return any(label != IGNORED for label in row.labels[1:])


def cut(row: TokenRow, most: int) -> TokenRow:
    """The row's first tokens."""
    return replace(row, input_ids=row.input_ids[:most], labels=row.labels[:most])


def encode(example: Example, tokenizer: Any, format: DataFormat) -> list[TokenRow]:
    """The rows of one example, untruncated: one, or for a conversation that the chat template renders otherwise when it
    goes on, one for each answer.

    Raises ValueError when the chat template refuses it, and for a text without a token.
    """
    if example.turns:
        return [
            TokenRow(number=example.number, input_ids=ids, labels=labels) for ids, labels in _chat(example, tokenizer)
        ]
    if format is DataFormat.CLASSIFICATION:
        ids = list(tokenizer(example.text).input_ids)
        if not ids:
            raise ValueError("has a text that the model's tokenizer turns into no token")
        return [TokenRow(number=example.number, input_ids=ids, labels=[IGNORED] * len(ids))]
    ids, labels = _encode_text(example, tokenizer, learn_all=format is DataFormat.TEXT)
    return [TokenRow(number=example.number, input_ids=ids, labels=labels)]


def _chat(example: Example, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of a conversation's rows."""
    answers = [place for place, turn in enumerate(example.turns) if turn.role == "assistant"]
    text = _render(example, answers[-1] + 1, tokenizer)
    spans = []
    for place in answers:
        before = _render(example, place, tokenizer, generation_prompt=True)
        after = _render(example, place + 1, tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            return [_learned(*_answer(example, one, tokenizer), tokenizer) for one in answers]
        # stripped, as many templates have it: the end is looked for behind what they keep at the least
        eos = after.find(tokenizer.eos_token, len(before) + len(example.turns[place].content.strip()))
        spans.append((len(before), len(after) if eos < 0 else eos + len(tokenizer.eos_token)))
    return [_learned(text, spans, tokenizer)]


def _answer(example: Example, place: int, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of the row of one answer, and what is learned of it: all that the template renders behind the prompt
    that asks for that answer, up to the end of sequence.

    A template that renders an answer without its own prompt, as one that opens a thought there and leaves thoughts out
    afterwards, gives the prompt alone: thought and answer stand behind it as they were given.
    """
    prompt = _render(example, place, tokenizer, generation_prompt=True)
    text = _render(example, place + 1, tokenizer)
    if not text.startswith(prompt):
        text = prompt + _as_given(example.turns[place], opened=prompt.rstrip().endswith(THOUGHT[0]))
    end = text.rfind(tokenizer.eos_token, len(prompt))
    return text, [(len(prompt), len(text) if end < 0 else end + len(tokenizer.eos_token))]


THOUGHT = ("<think>", "</think>")
"""What stands around a thought, in the templates of models that think before they answer."""


def _as_given(turn: Turn, *, opened: bool) -> str:
    """An answer behind a prompt; `opened`: the prompt begins the thought."""
    thought, answer = thought_and_answer(turn.content)
    if not opened:
        return turn.content
    return f"{thought}\n{THOUGHT[1]}\n\n{answer}"


def thought_and_answer(content: str) -> tuple[str, str]:
    """An answer's thought, which is empty where it has none, and what it says afterwards."""
    begin, end = THOUGHT
    thought, closed, answer = content.lstrip().partition(end)
    if not closed or not thought.startswith(begin):
        return "", content
    return thought.removeprefix(begin).strip("\n"), answer.lstrip("\n")


def _learned(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a rendered text; the characters of these spans are learned."""
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


def rendered_answers(example: Example, tokenizer: Any) -> list[str]:
    """Each answer as its own row has it. Raises ValueError."""
    places = (place for place, turn in enumerate(example.turns) if turn.role == "assistant")
    return [text[spans[0][0] :] for text, spans in (_answer(example, place, tokenizer) for place in places)]


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
