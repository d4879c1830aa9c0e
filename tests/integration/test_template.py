"""dataset.template: alpaca writes the prompt of Stanford Alpaca and Axolotl, and what is learned is the answer."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

from loractl.common.data.examples import Example, Turn
from loractl.common.data.formats import parse_examples
from loractl.common.data.rows import RawRow
from loractl.common.errors import UsageError
from loractl.common.job.sections import BadRow, DataFormat, PromptTemplate
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.prompt import prompt_for, templated
from loractl.worker.data.tokens import IGNORED, encode
from loractl.worker.protocol.messages import Note

from .conftest import Recipe

ALPACA = PromptTemplate.ALPACA
TASK = "Below is an instruction that describes a task"
ANSWER = "Write a response that appropriately completes the request."

WITHOUT = f"{TASK}. {ANSWER}\n\n### Instruction:\nName a queue.\n\n### Response:\n"
WITH = (
    f"{TASK}, paired with an input that provides further context. {ANSWER}\n\n"
    "### Instruction:\nName a queue.\n\n### Input:\nthe disk is full\n\n### Response:\n"
)


@pytest.mark.parametrize(("given", "prompt"), [("", WITHOUT), ("the disk is full", WITH)])
def test_a_row_is_what_axolotl_makes_of_it(tiny_model: Path, given: str, prompt: str) -> None:
    raw = {"instruction": "Name a queue.", "input": given, "output": "storage"}
    examples, _ = parse_examples([RawRow(number=1, value=raw)], DataFormat.ALPACA, "d", BadRow.ERROR, ALPACA)
    plain = load_tokenizer(str(tiny_model))
    tokenizer = templated(plain, ALPACA)
    (row,) = encode(examples[0], tokenizer, DataFormat.ALPACA)
    ids, labels = row.input_ids, row.labels
    learned = [label for label in labels if label != IGNORED]
    start = len(ids) - len(learned)
    assert tokenizer.decode(ids[:start]).removeprefix(tokenizer.bos_token) == prompt
    assert tokenizer.decode(learned) == f"storage{tokenizer.eos_token}"
    asked = [{"role": "user", "content": examples[0].turns[0].content}]
    assert prompt_for(DataFormat.ALPACA, asked, plain, ALPACA) == ids[:start], (
        "whoever asks the adapter writes the same"
    )
    assert plain.backend_tokenizer is tokenizer.backend_tokenizer, "it has no vocabulary of its own"
    assert plain.chat_template != tokenizer.chat_template, "another adapter of the same base keeps its own"


def test_nothing_is_learned_behind_an_answer_s_end_where_the_template_trims_it(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    eos = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}:\n{{ message.content | trim }}{{ eos_token }}\nand\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    turns = (Turn(role="user", content="a"), Turn(role="assistant", content="   storage"))
    (row,) = encode(Example(number=1, turns=turns), tokenizer, DataFormat.MESSAGES)
    ids, labels = row.input_ids, row.labels
    assert tokenizer.decode([label for label in labels if label != IGNORED]).strip() == f"storage{eos}"
    assert "and" in tokenizer.decode(ids)


def test_a_conversation_goes_on_and_a_system_message_takes_the_place_of_the_task(tiny_model: Path) -> None:
    tokenizer = templated(load_tokenizer(str(tiny_model)), ALPACA)
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    raw = {"messages": [{"role": role, "content": content} for role, content in turns]}
    examples, _ = parse_examples([RawRow(number=1, value=raw)], DataFormat.MESSAGES, "d", BadRow.ERROR, ALPACA)
    (row,) = encode(examples[0], tokenizer, DataFormat.MESSAGES)
    ids, labels = row.input_ids, row.labels
    eos, asked = tokenizer.eos_token, "### Instruction:\n{}\n\n### Response:\n"
    text = f"Be brief.\n\n{asked.format('a')}b{eos}\n\n{asked.format('c')}d{eos}"
    assert tokenizer.decode(ids).removeprefix(tokenizer.bos_token) == text
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == f"b{eos}d{eos}"
    with pytest.raises(UsageError, match="no place for the role tool"):
        prompt_for(DataFormat.MESSAGES, [{"role": "tool", "content": "x"}], tokenizer)


DATED = (
    "{% if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y') }}.{% endif %}{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DAY = dt.date(2026, 1, 14)


@pytest.mark.parametrize("named", [False, True])
def test_a_template_that_asks_for_the_date_is_told_that_of_the_job(tiny_model: Path, named: bool) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = {"default": DATED, "tool_use": ""} if named else DATED
    example = Example(number=1, turns=(Turn(role="user", content="a"), Turn(role="assistant", content="b")))
    told, lives = (
        tokenizer.decode(encode(example, one, DataFormat.MESSAGES)[0].input_ids)
        for one in (templated(tokenizer, PromptTemplate.CHAT, DAY), tokenizer)
    )
    assert told.startswith("Today is 14 Jan 2026.user: a") and lives.startswith("Today is ") and lives != told
    undated = load_tokenizer(str(tiny_model))
    assert templated(undated, PromptTemplate.CHAT, DAY) is undated


def test_a_job_whose_prompts_have_the_date_goes_on_from_its_checkpoint_on_another_day(
    recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "dated"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").write_text(DATED)
    few = {"samples": 0, "metrics": ["loss"]}
    recipe("first", max_steps=4, stop_after=2, job={"base_model": str(base)}, evaluation=few, day=DAY)
    other_box = tmp_path / "other box"
    _, told = recipe(
        "rest", resume="first", max_steps=4, job={"base_model": str(base)}, evaluation=few, day=DAY, cache_dir=other_box
    )
    notes = {note.kind: note.text for note in told if isinstance(note, Note)}
    assert notes["resumed"].startswith("resumed from the checkpoint of step "), notes
    assert "its prompts say that it is 2026-01-14" in notes["data"]
    result = tmp_path / "rest" / "result"
    assert json.loads((result / "report.json").read_text())["data"]["prompt_date"] == "2026-01-14"
    assert (result / "adapter" / "chat_template.jinja").read_text() == DATED, "it is asked on the day that it is then"
