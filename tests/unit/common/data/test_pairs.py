"""Pairs: the forms that other tools write them in, what is refused of them, and on which side of a split they land."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.data.examples import Example, Turn
from loractl.common.data.fields import Reading
from loractl.common.data.formats import detect_format, map_columns, parse_each
from loractl.common.data.rows import RawRow
from loractl.common.data.split import Split, split_data
from loractl.common.errors import DataError
from loractl.common.job.sections import DataFormat, DatasetSpec, PromptTemplate, RowFields

ASKED = {"role": "user", "content": "How?"}
BETTER, WORSE = {"role": "assistant", "content": "So."}, {"role": "assistant", "content": "Why ask?"}
BRIEF = {"role": "system", "content": "Be brief."}
TURNS = (Turn(role="user", content="How?", learned=False), Turn(role="assistant", content="So."))


def pair(value: dict[str, Any], **dataset: Any) -> tuple[DataFormat, Example | DataError, Reading]:
    """The row as a preference job reads it."""
    spec = DatasetSpec(path="d.jsonl", format=DataFormat.PREFERENCE, fields=RowFields.ALL, **dataset)
    rows = map_columns([RawRow(number=7, value=value)], spec.columns, "d.jsonl")
    format, _ = detect_format(rows, "d.jsonl", spec.format)
    reading = Reading.of(spec)
    examples, refused = parse_each(rows, format, "d.jsonl", spec.template, reading)
    return format, refused[0] if refused else examples[0], reading


def learned(value: dict[str, Any], **dataset: Any) -> Example:
    found = pair(value, **dataset)[1]
    assert isinstance(found, Example), found
    assert found.number == found.other.number == 7
    return found


def refused(value: dict[str, Any], **dataset: Any) -> DataError:
    found = pair(value, **dataset)[1]
    assert isinstance(found, DataError), found
    assert found.row == 7
    return found


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "TRL, explicit prompt": {"prompt": [ASKED], "chosen": [BETTER], "rejected": [WORSE]},
    "TRL, implicit prompt": {"chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
    "UltraFeedback": {"prompt": "How?", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
    "UltraFeedback with messages": {"prompt": "How?", "messages": [ASKED, BETTER], "chosen": [ASKED, BETTER],
                                    "rejected": [ASKED, WORSE], "score_chosen": 8.0},
    "LLaMA-Factory, alpaca": {"instruction": "How?", "input": "", "chosen": "So.", "rejected": "Why ask?"},
    "LLaMA-Factory, sharegpt": {"conversations": [{"from": "human", "value": "How?"}],
                                "chosen": {"from": "gpt", "value": "So."},
                                "rejected": {"from": "gpt", "value": "Why ask?"}},
    "Axolotl, chat_template.default": {"messages": [ASKED], "chosen": BETTER, "rejected": WORSE},
    "Axolotl, of texts": {"messages": "How?", "chosen": "So.", "rejected": "Why ask?"},
    "prompt as text, answers as messages": {"prompt": "How?", "chosen": [BETTER], "rejected": [WORSE]},
}  # fmt: skip


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_each_form_of_a_conversation_gives_the_same_pair(form: str) -> None:
    example = learned(CONVERSATIONS[form])
    assert pair(CONVERSATIONS[form])[0] is DataFormat.PREFERENCE
    assert example.turns == TURNS and example.asked == TURNS[:1] and not example.prompt
    assert example.other.turns == (TURNS[0], Turn(role="assistant", content="Why ask?"))
    assert example.answers == example.other.answers == [1]
    assert not example.other.rejected


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"instruction": "question"}, {"system": "", "question": "How?", "chosen": "So.", "rejected": "Why ask?"}),
        ({"instruction": "prompt"}, {"prompt": "How?", "chosen": "So.", "rejected": "Why ask?"}),
        (
            {"instruction": "input", "chosen": "chosen_response", "rejected": "rejected_response"},
            {"input": "How?", "chosen_response": "So.", "rejected_response": "Why ask?"},
        ),
        (
            {"messages": "conversation", "role": "who", "content": "said", "chosen": "better", "rejected": "worse"},
            {
                "conversation": [{"who": "user", "said": "How?"}],
                "better": {"who": "assistant", "said": "So."},
                "worse": [{"who": "assistant", "said": "Why ask?"}],
            },
        ),
    ],
    ids=["chatml.intel", "chatml.prompt_pairs", "chatml.icr", "chat_template.default"],
)
def test_rows_of_axolotl_are_read_by_the_names_of_their_columns(columns: dict[str, str], row: dict[str, Any]) -> None:
    format, example, reading = pair(row, columns=columns)
    assert format is DataFormat.PREFERENCE and isinstance(example, Example)
    assert example.turns == TURNS and json.loads(example.rejected)[0]["content"] == "Why ask?"
    assert not reading.unused


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": None, "chosen": "The sky is blue.", "rejected": "The sky is green."},
    ],
)
def test_plain_text_stays_plain_text(row: dict[str, Any]) -> None:
    format, example, _ = pair(row)
    assert format is DataFormat.PREFERENCE_TEXT and isinstance(example, Example)
    assert (example.prompt, example.text, example.rejected) == ("The sky is", "The sky is blue.", " green.")
    assert (example.other.prompt, example.other.text) == ("The sky is", "The sky is green.")
    assert example.asked == ()


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("At 12:30.", "At 12:45.", "At 12:"),
        ("A:\nblue", "A:\nblack", "A:\n"),
        ("Say foot", "Say football", "Say"),
        ("天空是蓝色", "天空是绿色", "天空是"),
        ("Human: hi\n\nAssistant: Hello!", "Human: hi\n\nAssistant: Go.", "Human: hi\n\nAssistant:"),
    ],
)
def test_what_both_texts_begin_with_ends_at_a_word(chosen: str, rejected: str, prompt: str) -> None:
    """Half a word would end within a token, which would count as prompt."""
    example = learned({"chosen": chosen, "rejected": rejected})
    assert (example.prompt, example.text, example.other.text) == (prompt, chosen, rejected)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"chosen": [BRIEF, ASKED, BETTER, ASKED, WORSE], "rejected": [BRIEF, ASKED, BETTER, ASKED, BETTER]},
    ],
)
def test_the_prompt_is_the_one_that_trl_extracts(row: dict[str, Any]) -> None:
    """`trl.data_utils.extract_prompt` of 1.16, by its rule: the first items that are the same."""
    same = 0
    while row["chosen"][same] == row["rejected"][same]:
        same += 1
    same -= row["chosen"][same - 1] == " "
    example = learned(row)
    if isinstance(row["chosen"], str):
        assert example.prompt == row["chosen"][:same]
    else:
        assert len(example.asked) == same
        assert [turn.content for turn in example.asked] == [message["content"] for message in row["chosen"][:same]]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "prompt": [ASKED], "chosen": [BETTER], "rejected": [WORSE]},
        {"system": "Be brief.", "prompt": "How?", "chosen": "So.", "rejected": "Why ask?"},
        {"system": "Be brief.", "instruction": "How?", "chosen": "So.", "rejected": "Why ask?"},
        {"prompt": [BRIEF, ASKED], "chosen": [BETTER], "rejected": [WORSE]},
        {"chosen": [BRIEF, ASKED, BETTER], "rejected": [BRIEF, ASKED, WORSE]},
        {"system": "Be brief.", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"prompt": [BRIEF, ASKED], "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"system": "Be brief.", "prompt": "How?", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
    ],
)
def test_a_system_message_is_never_lost(row: dict[str, Any]) -> None:
    example = learned(row)
    assert [(turn.role, turn.content) for turn in example.asked] == [("system", "Be brief."), ("user", "How?")]
    assert example.turns[2:] == TURNS[1:] and example.other.turns[:2] == example.asked


def test_a_column_of_systems_makes_conversations_although_the_first_row_has_none() -> None:
    row = {"system": None, "prompt": "How?", "chosen": "So.", "rejected": "Why ask?"}
    assert pair(row)[0] is DataFormat.PREFERENCE


def test_an_input_stands_below_its_instruction() -> None:
    row = {"instruction": "Shorten.", "input": "A long text.", "chosen": "A text.", "rejected": "No."}
    assert learned(row).asked[0].content == "Shorten.\n\nA long text."
    assert learned(row, template=PromptTemplate.ALPACA).asked[0].content == "Shorten.\n\n### Input:\nA long text."


def test_answers_may_call_tools_and_think() -> None:
    call = {"type": "function", "function": {"name": "disk", "arguments": '{"host": "heron"}'}}
    row = {
        "tools": [{"name": "disk", "parameters": {}}],
        "prompt": [ASKED],
        "chosen": [
            {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [call]},
            {"role": "tool", "content": "96 %"},
            BETTER,
        ],
        "rejected": [WORSE],
    }
    example = learned(row)
    assert json.loads(example.tools)[0]["function"]["name"] == "disk" and example.other.tools == example.tools
    assert [turn.role for turn in example.turns] == ["user", "assistant", "tool", "assistant"]
    assert example.turns[1].thought == "Look." and '"host": "heron"' in example.turns[1].calls
    assert example.answers == [1, 3] and len(example.asked) == 1
    swapped = learned({**row, "chosen": row["rejected"], "rejected": row["chosen"]})
    assert swapped.other.turns == example.turns


def test_earlier_answers_of_a_prompt_are_not_learned() -> None:
    example = learned({"chosen": [ASKED, BETTER, ASKED, BETTER], "rejected": [ASKED, BETTER, ASKED, WORSE]})
    assert example.answers == [3] and len(example.asked) == 3


@pytest.mark.parametrize(
    ("row", "kind", "what"),
    [
        ({"prompt": "How?", "chosen": " So.", "rejected": " So."}, "equal answers", "has the same answer twice"),
        ({"prompt": [ASKED], "chosen": [BETTER], "rejected": [BETTER]}, "equal answers", "has the same answer twice"),
        ({"chosen": [ASKED, BETTER], "rejected": [ASKED, BETTER]}, "equal answers", "has the same answer twice"),
        ({"chosen": "So it is.", "rejected": "So it is."}, "equal answers", "has the same answer twice"),
        ({"chosen": "Yes.", "rejected": "No."}, "prompts that differ", "do not begin with the same prompt"),
        ({"chosen": "blue", "rejected": "black"}, "prompts that differ", "do not begin with the same prompt"),
        ({"chosen": [ASKED, BETTER], "rejected": [{"role": "user", "content": "Why?"}, WORSE]}, "prompts that differ",
         "do not begin with the same prompt"),
        ({"prompt": "Why?", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]}, "prompts that differ",
         "has a prompt that is not in the conversation of its chosen answer"),
        ({"prompt": [BETTER], "chosen": "So.", "rejected": "No."}, "role order", "before the user has spoken"),
        ({"system": "Be brief.", "chosen": "So.", "rejected": "No."}, "prompts that differ",
         "do not begin with the same prompt"),
        ({"system": "", "prompt": "How?", "chosen": [ASKED, BETTER], "rejected": "No."}, "prompts that differ",
         "do not begin with the same prompt"),
        ({"prompt": "How?", "chosen": "", "rejected": " No."}, "empty answer", "the chosen answer is empty"),
        ({"prompt": "How?", "chosen": " Yes.", "rejected": " "}, "empty answer", "the rejected answer is empty"),
        ({"prompt": " ", "chosen": "Yes.", "rejected": "No."}, "nothing to learn", "prompt is empty"),
        ({"chosen": "It is", "rejected": "It is so."}, "empty answer",
         "the chosen answer is empty behind what both begin with"),
        ({"prompt": [ASKED], "chosen": [], "rejected": [WORSE]}, "empty answer", "the chosen answer is empty"),
        ({"prompt": [ASKED], "chosen": [{"role": "assistant", "content": " "}], "rejected": [WORSE]}, "empty answer",
         "the assistant's answer is empty"),
        ({"prompt": [ASKED, BETTER], "chosen": [{"role": "user", "content": "And?"}, BETTER], "rejected": [WORSE]},
         "prompts that differ", "do not begin with the same prompt"),
        ({"prompt": [ASKED, BETTER], "chosen": [WORSE], "rejected": [{"role": "user", "content": "And?"}, BETTER]},
         "role order", "second assistant message in a row"),
        ({"chosen": [ASKED, BETTER, ASKED, BETTER],
          "rejected": [ASKED, BETTER, {"role": "user", "content": "And?"}, BETTER]}, "role order",
         "the chosen answer begins with a message of the user, not of the assistant"),
        ({"prompt": [ASKED], "chosen": [{**BETTER, "weight": 0}], "rejected": [WORSE]}, "not a message",
         "the chosen answer has weight 0"),
        ({"prompt": [ASKED], "chosen": 3, "rejected": [WORSE]}, "not text", "chosen is a number"),
        ({"prompt": {"a": 1}, "chosen": [BETTER], "rejected": [WORSE]}, "not text", "prompt is an object"),
        ({"prompt": 3, "chosen": "Yes.", "rejected": "No."}, "not text", "prompt is a number, not text"),
        ({"prompt": [ASKED], "chosen": [{"role": "bot", "content": "So."}], "rejected": [WORSE]}, "unknown role",
         "has the role 'bot'"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_refused(row: dict[str, Any], kind: str, what: str) -> None:
    error = refused(row)
    assert error.kind == kind and what in error.what


def test_a_later_row_without_an_answer_is_refused_by_its_number() -> None:
    rows = [
        RawRow(number=1, value={"prompt": "How?", "chosen": " So.", "rejected": " No."}),
        RawRow(number=2, value={"prompt": "How?", "chosen": " So."}),
    ]
    _, (error,) = parse_each(rows, DataFormat.PREFERENCE_TEXT, "d.jsonl")
    assert error.sentence == "d.jsonl: row 2: has no rejected" and error.kind == "missing column"


def test_the_prompt_in_the_answers_is_taken_where_the_other_is_ignored() -> None:
    row = {"prompt": "[INST] How? [/INST] and more", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]}
    error = refused(row)
    assert error.hint is not None and "dataset.ignore: [prompt]" in error.hint
    assert learned(row, ignore=["prompt"]).turns == TURNS


def test_the_prompt_in_plain_answers_is_taken_where_the_other_is_ignored() -> None:
    row = {"prompt": "row 7", "chosen": "Human: How? Assistant: So.", "rejected": "Human: How? Assistant: Why ask?"}
    found = learned(row, ignore=["prompt"])
    assert (found.prompt, found.text) == ("Human: How? Assistant:", row["chosen"])


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": [ASKED], "chosen": [{**BETTER, "images": ["a.png"]}], "rejected": [WORSE]}, "chosen.images"),
        ({"prompt": [{**ASKED, "audio": "a.wav"}], "chosen": [BETTER], "rejected": [WORSE]}, "prompt.audio"),
        ({"prompt": [ASKED], "chosen": [BETTER], "rejected": {**WORSE, "thinking": "Hm."}}, "rejected.thinking"),
        ({"images": ["a.png"], "prompt": [ASKED], "chosen": [BETTER], "rejected": [WORSE]}, "images"),
    ],
)
def test_a_field_that_changes_a_pair_s_meaning_is_refused_until_it_is_ignored(row: dict[str, Any], name: str) -> None:
    assert f"has {name}, which is not read" in refused(row).what
    assert learned(row, ignore=[name]).turns == TURNS


def test_other_fields_are_named() -> None:
    row = {"prompt": [ASKED], "chosen": [{**BETTER, "score": 8}], "rejected": [WORSE], "source": "lab"}
    assert set(pair(row)[2].unused) == {"source", "chosen.score"}


def test_a_job_of_answers_is_told_of_pairs_and_a_job_of_pairs_of_answers() -> None:
    pairs, answers = CONVERSATIONS["TRL, explicit prompt"], {"prompt": "How?", "completion": " So."}
    with pytest.raises(DataError, match=r"the rows are pairs .*task_type: preference"):
        detect_format([RawRow(number=1, value=pairs)], "d.jsonl")
    with pytest.raises(DataError, match="pairs are rows with chosen and rejected, and the columns are") as caught:
        detect_format([RawRow(number=1, value=answers)], "d.jsonl", DataFormat.PREFERENCE)
    assert caught.value.hint is not None and "{chosen: better, rejected: worse}" in caught.value.hint


def test_the_columns_that_a_job_file_names_are_read() -> None:
    row = {"question": "The sky is", "better": " blue.", "worse": " green."}
    example = learned(row, columns={"prompt": "question", "chosen": "better", "rejected": "worse"})
    assert (example.prompt, example.rejected) == ("The sky is", " green.")


def test_the_forms_that_the_page_shows_are_pairs() -> None:
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("\n## Pairs\n")[2].partition("\n## ")[0]
    shown = [json.loads(line) for line in section.splitlines() if line.startswith("{")]
    formats = [pair(row)[0] for row in shown if learned(row)]
    assert formats == [DataFormat.PREFERENCE] * 6 + [DataFormat.PREFERENCE_TEXT] * 2


def split_of(rows: list[dict[str, Any]], *more: list[dict[str, Any]], held: Any = None, **dataset: Any) -> Split:
    sources = [{"path": f"more{n}.jsonl"} for n in range(len(more))]
    spec = DatasetSpec(path="d.jsonl", format=DataFormat.PREFERENCE, more=sources, **dataset)
    numbered = [[RawRow(number=n, value=row) for n, row in enumerate(part, start=1)] for part in (rows, *more)]
    others = None if held is None else [RawRow(number=n, value=row) for n, row in enumerate(held, start=1)]
    return split_data(spec, numbered[0], others, numbered[1:])


prompts = st.sampled_from(["one", "two", "Two", "three", "four ", " four", "five"])


@given(st.lists(st.tuples(prompts, st.sampled_from("abc"), st.sampled_from("xyz")), min_size=2), st.floats(0.05, 0.9))
def test_pairs_of_one_prompt_are_never_on_both_sides(drawn: list[tuple[str, str, str]], share: float) -> None:
    rows = [{"prompt": [{"role": "user", "content": p}], "chosen": a, "rejected": b} for p, a, b in drawn]
    folded = {p.strip().lower() for p, _, _ in drawn}
    if len(folded) < 2:
        with pytest.raises(DataError, match="two different prompts"):
            split_of(rows, test_size=share)
        return
    split = split_of(rows, test_size=share)
    sides = [[e.asked[0].content.strip().lower() for e in side] for side in (split.train, split.held_out)]
    assert not {*sides[0]} & {*sides[1]} and {*sides[0]} | {*sides[1]} == folded
    assert len(sides[1]) == len({*sides[1]}), "each prompt is measured once"
    assert len(split.train) + len(split.held_out) + split.repeated == len(rows)


def test_a_held_out_file_loses_the_prompts_that_are_trained_on() -> None:
    def row(asked: str, better: str) -> dict[str, Any]:
        return {"prompt": asked, "chosen": f" {better}", "rejected": " no"}

    held = [row("one", "d"), row("ONE", "a"), row("three", "a"), row("three", "b")]
    split = split_of([row("one", "a"), row("two", "b")], held=held, eval_path="held.jsonl", test_size=None)
    assert [e.prompt for e in split.held_out] == ["three"]
    assert (split.overlap, split.repeated) == (2, 1)


def test_several_data_sets_of_pairs_go_together_where_both_are_conversations() -> None:
    asked = {"instruction": "Why?", "chosen": "So.", "rejected": "No."}
    split = split_of([CONVERSATIONS["UltraFeedback"]], [asked], test_size=0.5)
    assert len(split.train) + len(split.held_out) == 2
    with pytest.raises(DataError, match="preference_text, which a job can't learn next to preference"):
        split_of([CONVERSATIONS["UltraFeedback"]], [{"prompt": "How?", "chosen": " So.", "rejected": " No."}])
