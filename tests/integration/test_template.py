"""dataset.template: alpaca writes the prompt of Stanford Alpaca and Axolotl, and what is learned is the answer."""

from __future__ import annotations

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
