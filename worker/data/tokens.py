"""From an example to token ids and labels: the chat template, and what is learned.

The loss covers only answers (everything for `text`), the end-of-sequence token is learned, and there is at most one
BOS.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from loractl.common.data.examples import Example, Turn
from loractl.common.job.sections import DataFormat

APART = "since the model's chat template changes earlier turns"
"""Why a conversation has several rows."""

IGNORED = -100
"""The label that cross-entropy leaves out (torch.nn.CrossEntropyLoss's default ignore_index)."""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One tokenised row; `labels` equal `input_ids` where the model learns to continue, never at the first token, and
    are IGNORED elsewhere."""

    number: int  # of the example: rows of one conversation share it, and follow each other
    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = ()  # of a packed row: where its second and later examples begin
    label: int | None = None  # of a classifier's row: its index in PreparedData.label_names
    asked: int = 0  # of a pair's row whose prompt is learned, too: tokens before the chosen answer


def teaches(row: TokenRow) -> bool:
    """Whether anything of it is learned: its first token has no context to be predicted from."""
    return any(label != IGNORED for label in row.labels[1:])


def cut(row: TokenRow, most: int) -> TokenRow:
    """The row's first tokens."""
    return replace(row, input_ids=row.input_ids[:most], labels=row.labels[:most])


def texts_of(row: TokenRow) -> list[TokenRow]:
    """Each text of a row as a row of its own: a packed row's examples, or a pair's answers after their prompts."""
    borders = [0, *row.starts, len(row.input_ids)]
    return [
        replace(row, input_ids=row.input_ids[begin:end], labels=row.labels[begin:end], starts=())
        for begin, end in itertools.pairwise(borders)
    ]


def joined(rows: Sequence[TokenRow]) -> TokenRow:
    """One row of all texts of some rows, none of whose first tokens is learned."""
    ids, labels, starts = list[int](), list[int](), list[int]()
    for text in itertools.chain.from_iterable(map(texts_of, rows)):
        starts.append(len(ids))
        ids += text.input_ids
        labels += [IGNORED, *text.labels[1:]]
    return TokenRow(number=rows[0].number, input_ids=ids, labels=labels, starts=tuple(starts[1:]))


def asked_in(row: TokenRow) -> int:
    """The number of tokens before the row's first learned token."""
    return next((place for place, label in enumerate(row.labels) if label != IGNORED), len(row.labels))


def unlearned(row: TokenRow) -> TokenRow:
    """What precedes the row's answer, all of it to be learned."""
    given = row.input_ids[: asked_in(row)]
    return replace(row, input_ids=given, labels=given)


def encode(example: Example, tokenizer: Any, format: DataFormat) -> list[TokenRow]:
    """The rows of one example, untruncated: one, or one for each answer if the chat template renders a conversation
    differently as it continues.

    Raises ValueError if the chat template refuses it.
    """
    if example.turns:
        found = _chat(example, tokenizer)
    else:
        found = [_encode_text(example, tokenizer, learn_all=format is DataFormat.TEXT)]
    # nothing precedes a row's first token, so it is never learned
    return [TokenRow(number=example.number, input_ids=ids, labels=[IGNORED, *labels[1:]]) for ids, labels in found]


def _chat(example: Example, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of a conversation's rows."""
    answers = example.answers
    text = _render(example, answers[-1] + 1, tokenizer)
    _refuse_without_tools(example, tokenizer)
    spans = []
    for place in answers:
        before = _render(example, place, tokenizer, generation_prompt=True)
        after = _render(example, place + 1, tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            return [_behind(*_answer(example, one, tokenizer), tokenizer) for one in answers]
        turn = example.turns[place]
        _refuse_without_calls(turn, after[len(before) :])
        if turn.thought or turn.calls:
            eos = after.rfind(tokenizer.eos_token, len(before))
        else:  # stripped, as in many templates: the search for the end starts after the least that they keep
            eos = after.find(tokenizer.eos_token, len(before) + len(turn.content.strip()))
        spans.append((len(before), len(after) if eos < 0 else eos + len(tokenizer.eos_token)))
    return [_learned(text, spans, tokenizer)]


def _answer(example: Example, place: int, tokenizer: Any) -> tuple[str, str]:
    """The row of one answer: the prompt that asks for it, and all that the template renders after that, up to the end
    of sequence.

    A template that renders an answer without its own prompt, like one that opens a thought there and leaves thoughts
    out afterwards, gives only the prompt: thought and answer follow it unchanged.
    """
    prompt, turn = _render(example, place, tokenizer, generation_prompt=True), example.turns[place]
    text = _render(example, place + 1, tokenizer)
    kept = text.startswith(prompt)
    behind = text.removeprefix(prompt) if kept else _as_given(example, place, prompt, tokenizer)
    _refuse_without_calls(turn, behind)
    end = behind.rfind(tokenizer.eos_token)
    return prompt, behind if end < 0 else behind[: end + len(tokenizer.eos_token)]


THOUGHT = ("<think>", "</think>")
"""The marks around a thought, in the templates of models that think before they answer."""


def _as_given(example: Example, place: int, prompt: str, tokenizer: Any) -> str:
    """An answer after a prompt with which the template does not render it. The template decides the form of a call and
    the end of an answer."""
    turn = example.turns[place]
    given = with_thought(turn)
    thought, answer = thought_and_answer(given)
    opened = prompt.rstrip().endswith(THOUGHT[0])
    before = f"{thought}\n{THOUGHT[1]}\n\n" if opened else given.removesuffix(answer)
    marked = replace(example, turns=(*example.turns[:place], Turn(role=turn.role, content=_MARK)))
    header, _, end = _render(marked, place + 1, tokenizer).partition(_MARK)
    if not turn.calls:
        return before + answer + end
    text = _render(example, place + 1, tokenizer)
    call = text.removeprefix(header) if text.startswith(header) else ""
    return call if thought and thought in call else before + call


_MARK = "\u2042 an answer \u2042"
"""Text that no answer contains: it shows what the template writes around an answer."""


def thought_and_answer(content: str) -> tuple[str, str]:
    """An answer's thought, empty if it has none, and the text after it."""
    begin, end = THOUGHT
    thought, closed, answer = content.lstrip().partition(end)
    if not closed or not thought.startswith(begin):
        return "", content
    return thought.removeprefix(begin).strip("\n"), answer.lstrip("\n")


def _behind(prompt: str, answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of an answer after its prompt, whose tokens are those that the model gets when asked."""
    ids, labels = _learned(prompt + answer, [(len(prompt), len(prompt + answer))], tokenizer)
    asked = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    if ids[: len(asked)] == asked:
        return ids, labels
    own, _ = _learned(answer, [(0, len(answer))], tokenizer)  # a token would have crossed the border
    return [*asked, *own], [IGNORED] * len(asked) + own


def _learned(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a rendered text; the characters in these spans are learned."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), encoded.offset_mapping
    learned = [any(start <= a and b <= end for start, end in spans) and a < b for a, b in offsets]
    labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
    if text.find(tokenizer.eos_token, spans[-1][0]) < 0:  # the template writes no end: teach one
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
    """(prompt ids, prompt for people, expected answer) of the example's last answer; None for plain text.

    Where the template writes an empty thought before an answer without one, as Qwen3's does, the prompt ends with it,
    as under `enable_thinking: false`: base and adapter answer at once, and what they say is what is expected.
    """
    if example.turns:
        last = example.answers[-1]
        rendered = _render(example, last, tokenizer, generation_prompt=True)
        shown = (
            example.turns[last - 1].content
            if last == 1
            else "\n".join(f"{t.role}: {t.said}" for t in example.turns[:last])
        )
        turn = example.turns[last]
        expected = turn.content  # what a model writes that has learned the answer, up to its end
        if turn.thought or turn.calls or thought_and_answer(turn.content)[0]:
            expected = _answer(example, last, tokenizer)[1].removesuffix(tokenizer.eos_token).strip()
        elif THOUGHT[1] in str(tokenizer.chat_template):
            empty = _NO_THOUGHT.match(_answer(example, last, tokenizer)[1])
            rendered += empty[0] if empty else ""
        return tokenizer(rendered, add_special_tokens=False).input_ids, shown, expected
    if example.prompt:
        return (
            without_eos(tokenizer(example.prompt).input_ids, tokenizer),
            example.prompt,
            example.text[len(example.prompt) :],
        )
    return None


_NO_THOUGHT = re.compile(rf"\s*({THOUGHT[0]})?\s*{THOUGHT[1]}\s*")


def rendered(example: Example, tokenizer: Any) -> str:
    """A conversation as the chat template writes it, up to its last answer. Raises ValueError if it refuses it."""
    return _render(example, example.answers[-1] + 1, tokenizer)


def rendered_answers(example: Example, tokenizer: Any) -> list[str]:
    """Each answer as its own row has it. Raises ValueError."""
    return [_answer(example, place, tokenizer)[1] for place in example.answers]


def _refuse_without_tools(example: Example, tokenizer: Any) -> None:
    """Raises ValueError if the template does not show the tools that answers may call."""
    if not example.tools:
        return
    end = example.answers[0]
    if _render(example, end, tokenizer) == _render(replace(example, tools=""), end, tokenizer):
        raise ValueError("the model's chat template has no place for tools; dataset.ignore: [tools] leaves them out")


def _refuse_without_calls(turn: Turn, shown: str) -> None:
    """Raises ValueError if the template leaves out a call of the answer that it renders."""
    if turn.calls and any(call["function"]["name"] not in shown for call in json.loads(turn.calls)):
        raise ValueError("the model's chat template has no place for tool calls")


def _render(example: Example, end: int, tokenizer: Any, *, generation_prompt: bool = False) -> str:
    messages = [message_of(turn, tokenizer) for turn in example.turns[:end]]
    tools = json.loads(example.tools) if example.tools else ()
    return render(messages, tokenizer, tools, generation_prompt=generation_prompt)


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Sequence[Any] = (),
    more: Mapping[str, Any] | None = None,
    *,
    generation_prompt: bool,
) -> str:
    """A conversation as the model's chat template writes it. `more`: the template's own variables.

    Raises ValueError if the template refuses it.
    """
    given = {**(more or {}), "tokenize": False, "add_generation_prompt": generation_prompt}
    given |= {"tools": list(tools)} if tools else {}
    try:
        try:
            text: str = tokenizer.apply_chat_template([dict(message) for message in messages], **given)
        except TypeError:  # DeepSeek's template joins a call's arguments as text
            text = tokenizer.apply_chat_template([_with_arguments_as_text(message) for message in messages], **given)
    except (TemplateError, TypeError) as error:  # raised by the template, like "System role not supported"
        raise ValueError(f"the model's chat template refuses it: {error}") from error
    return text


def message_of(turn: Turn, tokenizer: Any) -> dict[str, Any]:
    """A turn as chat templates read it. A thought that the template does not ask for precedes the content."""
    apart = {
        "tool_calls": json.loads(turn.calls) if turn.calls else None,
        "name": turn.name,
        "tool_call_id": turn.call_id,
    }
    known = turn.thought and "reasoning_content" in str(tokenizer.chat_template)
    said = {"content": turn.content, "reasoning_content": turn.thought} if known else {"content": with_thought(turn)}
    return {"role": turn.role, **said, **{key: value for key, value in apart.items() if value}}


def with_thought(turn: Turn) -> str:
    """The content after the thought."""
    begin, end = THOUGHT
    return f"{begin}\n{turn.thought}\n{end}\n\n{turn.content}" if turn.thought else turn.content


def _with_arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if calls := changed.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ]
    return changed


def without_eos(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Some tokenizers close every text themselves; the end is added once, later."""
    kept = list(ids)
    while len(kept) > 1 and kept[-1] == tokenizer.eos_token_id:
        kept.pop()
    return kept
