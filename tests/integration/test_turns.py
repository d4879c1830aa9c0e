"""Templates that render earlier turns otherwise when a conversation goes on: a row for each answer, counted as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from loractl.common.data.examples import Example, Turn
from loractl.common.data.fields import Reading
from loractl.common.data.formats import parse_examples
from loractl.common.data.rows import RawRow
from loractl.common.errors import DataError
from loractl.common.job.sections import DataFormat, RowFields
from loractl.common.job.spec import JobSpec
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.check import check_data
from loractl.worker.data.prepared import PreparedData, packed, prepare_data
from loractl.worker.data.text import row_text, trained_row
from loractl.worker.data.tokens import IGNORED, TokenRow, encode, prompt_of
from loractl.worker.evaluation.answers import exact
from loractl.worker.evaluation.evaluation import Work
from loractl.worker.evaluation.row_losses import RowScores, by_example

from ..models import CHAT_TEMPLATE

_SPOKEN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

FORGETS = (  # as Qwen3 does: what was thought before the last question
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "<|im_start|>assistant\n{% if loop.index0 > last.user %}<think>\n"
    "{{ parts[0].replace('<think>', '').strip() if parts | length > 1 }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip() }}<|im_end|>\n{% else %}" + _SPOKEN + "{% endif %}{% endfor %}" + _ASKED
)
OPENS = (  # as DeepSeek-R1 does: the prompt begins a thought, and no answer shows one
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n{% else %}" + _SPOKEN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
COUNTS = "{{ messages | length }}{% for m in messages %}" + _SPOKEN + "{% endfor %}" + _ASKED


def tokenizer_with(model: Path, template: str) -> Any:
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def learned_of(messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, str]]:
    """(what is given, what is learned) of each row."""
    turns = tuple(Turn(role=m["role"], content=m["content"]) for m in messages)
    rows = encode(Example(number=1, turns=turns), tokenizer, DataFormat.MESSAGES)
    found = []
    for row in rows:
        learned = [label for label in row.labels if label != IGNORED]
        begin = next(n for n, label in enumerate(row.labels) if label != IGNORED)
        found.append((tokenizer.decode(row.input_ids[:begin]), tokenizer.decode(learned)))
    return found


THOUGHT = talk("a?", "<think>\nhm\n</think>\n\nb", "c?", "<think>so</think>d")


def test_each_answer_has_the_context_that_the_template_gives_it(tiny_model: Path) -> None:
    tokenizer = tokenizer_with(tiny_model, FORGETS)
    first, second = learned_of(THOUGHT, tokenizer)
    for found, messages in ((first, THOUGHT[:1]), (second, THOUGHT[:3])):
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found[0] == asked, "what the adapter is asked by"
    assert "hm" not in second[0], "the model sees no earlier thought when it is asked, so it learns without one"
    assert first[1] == "<think>\nhm\n</think>\n\nb<|im_end|>"
    assert second[1] == "<think>\nso\n</think>\n\nd<|im_end|>"


def test_a_template_that_keeps_earlier_turns_makes_one_row(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    turns = tuple(Turn(role=m["role"], content=m["content"]) for m in THOUGHT)
    (row,) = encode(Example(number=1, turns=turns), tokenizer, DataFormat.MESSAGES)
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(THOUGHT, tokenize=False)
    single = tokenizer_with(tiny_model, FORGETS)
    assert len(learned_of(talk("a?", "b"), single)) == 1, "with one answer nothing changes afterwards"


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("<think>\nhm\n</think>\n\nb", "hm\n</think>\n\nb<|im_end|>"),
        ("b", "\n</think>\n\nb<|im_end|>"),
        ("b </think> c", "\n</think>\n\nb </think> c<|im_end|>"),
    ],
    ids=["with a thought", "without one", "with a mark alone"],
)
def test_behind_a_prompt_that_opens_a_thought_the_thought_is_closed_once(
    tiny_model: Path, answer: str, learned: str
) -> None:
    found = learned_of(talk("a?", answer), tokenizer_with(tiny_model, OPENS))
    assert found == [("<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n<think>\n", learned)]


def test_an_answer_that_the_template_renders_without_its_prompt_is_taken_as_given(tiny_model: Path) -> None:
    tokenizer = tokenizer_with(tiny_model, COUNTS)
    found = learned_of(talk("a?", "b", "c?", "d"), tokenizer)
    assert [learned for _, learned in found] == ["b<|im_end|>", "d<|im_end|>"]
    assert [given[0] for given, _ in found] == ["1", "3"]


def prepare(model: Path, folder: Path, rows: int = 20, **dataset: Any) -> tuple[PreparedData, JobSpec, Any]:
    """Conversations of two answers, and as many of one."""
    file = folder / "talks.jsonl"
    talks = [
        talk(f"ask {n}", f"<think>{n}</think>say {n}", f"more {n}", f"no {n}")[: 2 + n % 2 * 2] for n in range(rows)
    ]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    spec = JobSpec.model_validate(
        {"name": "t", "base_model": str(model), "dataset": {"path": str(file), "test_size": 0.4, **dataset}}
    )
    tokenizer = tokenizer_with(model, FORGETS)
    cache = folder / "cache"
    data = prepare_data(spec.dataset, str(file), None, None, tokenizer, cache)
    again = prepare_data(spec.dataset, str(file), None, None, tokenizer, cache)
    assert again.train == data.train and again.facts() == data.facts(), "the cache has the counts, too"
    return data, spec, tokenizer


def test_conversations_are_counted_held_out_measured_and_shown_as_one(tiny_model: Path, tmp_path: Path) -> None:
    data, spec, tokenizer = prepare(tiny_model, tmp_path)
    facts = data.facts()
    assert (facts["train_rows"], facts["held_out_rows"]) == (12, 8)
    assert (facts["conversations_apart"], facts["rows_of_conversations_apart"]) == (10, 20)
    assert len(data.train.rows) + len(data.held_out.rows) == 30
    asked = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"max_rows": 3})})
    work = Work.of(data, asked, tokenizer)
    assert work.numbers == [example.number for example in data.held_out.examples[:3]]
    checked = check_data(spec, tokenizer)
    (note,) = [finding for finding in checked.findings if finding.kind == "a row for each answer"]
    assert (checked.train_rows, checked.held_out_rows, checked.left_out) == (12, 8, 0)
    several = [rows for rows in data.train.rows.by_example() if len(rows) == 2]
    assert note.sentence.startswith(f"{len(several)} rows as {2 * len(several)} rows"), note.sentence
    assert not [f for f in checked.findings if "leaves out" in f.text], "each thought stands in its own row"
    number = several[0][0].number
    shown = trained_row(spec, tokenizer, number)
    assert shown.rows == several[0] and len(shown.as_json()["rows"]) == 2
    text = row_text(spec.dataset, shown, tokenizer, styled=False)
    assert "2 rows, one for each answer, since the model's chat template changes earlier turns." in text
    assert text.count("[[<think>") == 2


def test_an_interval_is_drawn_by_conversation() -> None:
    rows = [TokenRow(number=number, input_ids=[1], labels=[1]) for number in (4, 7, 7, 9)]
    values = np.array([1.0, 2.0, 4.0, 8.0])
    scores = RowScores(loss=values, tokens=values, stop_loss=values, stops=values, right=values)
    assert by_example(scores, rows).loss.tolist() == [1.0, 6.0, 8.0]
    assert by_example(scores, [*rows[:2], TokenRow(number=8, input_ids=[1], labels=[1]), rows[3]]) is scores


def test_no_packed_row_has_two_of_one_conversation(tiny_model: Path, tmp_path: Path) -> None:
    data, spec, _ = prepare(tiny_model, tmp_path)
    asked = spec.model_copy(update={"training": spec.training.model_copy(update={"packing": True})})
    joined = packed(data, asked).packed
    assert joined is not None
    own = {tuple(row.input_ids): row.number for row in data.train.rows}
    for row in joined:
        ends = [*row.starts, len(row.input_ids)]
        numbers = [own[tuple(row.input_ids[a:b])] for a, b in zip([0, *row.starts], ends, strict=True)]
        assert len(set(numbers)) == len(numbers)
    assert len(joined) == 2, "all that may stand together does"


@pytest.mark.parametrize(("overflow", "left", "cut"), [("drop", 10, 0), ("truncate", 0, 10)])
def test_a_conversation_is_too_long_when_one_of_its_rows_is(
    tiny_model: Path, tmp_path: Path, overflow: str, left: int, cut: int
) -> None:
    data, spec, tokenizer = prepare(tiny_model, tmp_path, max_length=64, on_overflow=overflow)
    longest = [max(len(row.input_ids) for row in rows) for rows in data.train.rows.by_example()]
    facts = data.facts()
    assert (facts["too_long_rows_dropped"], facts["truncated_rows"]) == (left, cut)
    assert max(longest) <= 64
    assert check_data(spec, tokenizer).left_out == left


CALLS = (  # as Qwen's: tools in the system message, a call between marks, an answer of a tool as the user's
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}" + _ASKED
)
JOINS_TEXT = CALLS.replace("c.function.arguments | tojson", "'' + c.function.arguments")
FIND = {"name": "find", "parameters": {"type": "object", "properties": {"host": {"type": "string"}}}}
QUESTION = {"role": "user", "content": "is heron full?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"host": "heron"}}}
FOUND = {"role": "tool", "name": "find", "tool_call_id": "c1", "content": "96 %"}
ANSWER = {"role": "assistant", "content": "Nearly."}


def calling(calls: Any, content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def rows_of(row: dict[str, Any], tokenizer: Any, fields: RowFields = RowFields.ALL) -> list[TokenRow]:
    raw = [RawRow(number=1, value=row)]
    (example,), _ = parse_examples(raw, DataFormat.MESSAGES, "d", reading=Reading(fields=fields))
    return encode(example, tokenizer, DataFormat.MESSAGES)


def learned_in(row: TokenRow, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


@pytest.mark.parametrize("template", [CALLS, JOINS_TEXT], ids=["an object", "joins text"])
@pytest.mark.parametrize(
    ("tools", "calls"),
    [
        ([{"type": "function", "function": FIND}], [CALL]),
        ([FIND], [{"name": "find", "arguments": '{"host": "heron"}'}]),
        (json.dumps([FIND]), [{"function": {"name": "find", "arguments": '{"host": "heron"}'}}]),
    ],
    ids=["of OpenAI", "flat", "as text"],
)
def test_a_call_is_learned_as_the_template_writes_it(
    tiny_model: Path, template: str, tools: Any, calls: list[Any]
) -> None:
    tokenizer = tokenizer_with(tiny_model, template)
    row = {"tools": tools, "messages": [QUESTION, calling(calls), FOUND, ANSWER]}
    (made,) = rows_of(row, tokenizer)
    call = '<tool_call>\n{"name": "find", "arguments": {"host": "heron"}}\n</tool_call><|im_end|>'
    assert learned_in(made, tokenizer) == f"{call}Nearly.<|im_end|>"
    text = tokenizer.decode(made.input_ids)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "find"')
    assert "user\n96 %<|im_end|>" in text


def test_a_template_without_a_place_for_tools_or_calls_is_refused(tiny_model: Path) -> None:
    plain = load_tokenizer(str(tiny_model))
    with pytest.raises(ValueError, match="has no place for tools"):
        rows_of({"tools": [FIND], "messages": [QUESTION, ANSWER]}, plain)
    with pytest.raises(ValueError, match="has no place for tool calls"):
        rows_of({"messages": [QUESTION, calling([CALL])]}, plain)


def test_what_is_ignored_is_not_read(tiny_model: Path) -> None:
    reading = Reading(fields=RowFields.ALL, ignore=frozenset({"tools", "messages.reasoning_content", "images"}))
    row = {"tools": [FIND], "images": ["x"], "messages": [QUESTION, {**ANSWER, "reasoning_content": "hm"}]}
    (example,), _ = parse_examples([RawRow(number=1, value=row)], DataFormat.MESSAGES, "d", reading=reading)
    tokenizer = load_tokenizer(str(tiny_model))
    assert encode(example, tokenizer, DataFormat.MESSAGES) == rows_of({"messages": [QUESTION, ANSWER]}, tokenizer)
    with pytest.raises(DataError, match=r"row 1: has images, which is not read"):
        rows_of(row, tokenizer)


def test_the_answer_that_is_expected_is_the_call_as_it_is_learned(tiny_model: Path) -> None:
    tokenizer = tokenizer_with(tiny_model, CALLS)
    raw = [RawRow(number=1, value={"tools": [FIND], "messages": [QUESTION, calling([CALL])]})]
    (example,), _ = parse_examples(raw, DataFormat.MESSAGES, "d", reading=Reading(fields=RowFields.ALL))
    found = prompt_of(example, tokenizer)
    assert found is not None
    assert found[2] == '<tool_call>\n{"name": "find", "arguments": {"host": "heron"}}\n</tool_call>'
    assert tokenizer.decode(found[0]).endswith("is heron full?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("answer", ["b", "<think>\nhm\n</think>\n\nb", "<think>so</think>d"])
@pytest.mark.parametrize("template", [FORGETS, OPENS, CHAT_TEMPLATE])
def test_what_is_expected_is_what_is_learned_whether_a_template_writes_thoughts_or_not(
    tiny_model: Path, template: str, answer: str
) -> None:
    """Qwen3's and R1's write an empty thought before an answer that has none: a perfect adapter would score 0."""
    tokenizer = tokenizer_with(tiny_model, template)
    raw = [RawRow(number=1, value={"messages": talk("a?", answer)})]
    (example,), _ = parse_examples(raw, DataFormat.MESSAGES, "d")
    found, (row,) = prompt_of(example, tokenizer), encode(example, tokenizer, DataFormat.MESSAGES)
    assert found is not None
    learned = tokenizer.decode(row.input_ids[len(found[0]) :]).split(tokenizer.eos_token)[0]
    assert row.input_ids[: len(found[0])] == found[0] and exact(learned, found[2])


@pytest.mark.parametrize(("template", "knows"), [(CALLS, True), (CHAT_TEMPLATE, False)])
def test_a_thought_is_learned_where_the_template_knows_it_and_where_not(
    tiny_model: Path, template: str, knows: bool
) -> None:
    tokenizer = tokenizer_with(tiny_model, template)
    (made,) = rows_of({"messages": [QUESTION, {**ANSWER, "reasoning_content": "it has 96 %"}]}, tokenizer)
    assert ("reasoning_content" in template) is knows
    assert learned_in(made, tokenizer) == "<think>\nit has 96 %\n</think>\n\nNearly.<|im_end|>"


def test_an_answer_of_weight_0_is_context(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    first, second = {**ANSWER, "weight": 0}, {"role": "assistant", "content": "Now it is.", "weight": 1}
    (made,) = rows_of({"messages": [QUESTION, first, QUESTION, second]}, tokenizer)
    assert learned_in(made, tokenizer) == "Now it is.<|im_end|>"
    assert "Nearly." in tokenizer.decode(made.input_ids)
    (made,) = rows_of({"messages": [QUESTION, {**second}, QUESTION, first]}, tokenizer)
    assert tokenizer.decode(made.input_ids).endswith("Now it is.<|im_end|>\n"), "what comes after is left out"
    with pytest.raises(DataError, match="no assistant message to learn"):
        rows_of({"messages": [QUESTION, first]}, tokenizer)


def test_a_stored_job_reads_its_rows_as_before(tiny_model: Path) -> None:
    tokenizer = tokenizer_with(tiny_model, CALLS)
    rich = {"tools": [FIND], "score": 3, "messages": [QUESTION, {**ANSWER, "weight": 0, "reasoning_content": "hm"}]}
    stored = JobSpec.model_validate({"name": "t", "base_model": "m", "dataset": {"path": "x.jsonl"}})
    assert stored.dataset.fields is RowFields.TEXT
    reading = Reading.of(stored.dataset)
    (example,), _ = parse_examples([RawRow(number=1, value=rich)], DataFormat.MESSAGES, "d", reading=reading)
    plain = rows_of({"messages": [QUESTION, ANSWER]}, tokenizer, RowFields.TEXT)
    assert (
        encode(example, tokenizer, DataFormat.MESSAGES) == plain == rows_of({"messages": [QUESTION, ANSWER]}, tokenizer)
    )
    assert sorted(reading.unused) == ["messages.reasoning_content", "messages.weight", "score", "tools"]
    assert (
        example.content_hash()
        == Example(
            number=1, turns=(Turn(role="user", content="is heron full?"), Turn(role="assistant", content="Nearly."))
        ).content_hash()
    )
