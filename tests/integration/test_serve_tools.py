"""Tools through loractl serve: calls told from text, demanded, streamed and answered, by the official openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loractl.worker.serving.decoding.grammar import HERMES, LLAMA, MISTRAL, CallForm, CallReader, form_of
from loractl.worker.serving.decoding.request import Ask

from ..served import engine_of, served
from .test_turns import CALLS

HOST = {"type": "object", "properties": {"host": {"enum": ["heron", "owl"]}}, "required": ["host"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {**HOST, "additionalProperties": False}}}
    for name in ("disk", "load")
]
ASK = {"role": "user", "content": "is heron full?"}


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    engine = engine_of(tiny_model)
    engine.tokenizer.chat_template = CALLS.replace("t | tojson", "t.function.name")  # so that more fits
    with (
        served(engine, tiny_model, tmp_path_factory.mktemp("home")) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as asking,
    ):
        yield asking


def ask(client: openai.OpenAI, *messages: Any, **more: Any) -> Any:
    given = {"model": "base", "messages": messages or [ASK], "max_tokens": 120, **more}
    return client.chat.completions.create(**given)


@pytest.mark.parametrize("name", ["disk", "load"])
def test_a_demanded_call_comes_as_one_with_arguments_of_its_schema(client: openai.OpenAI, name: str) -> None:
    named = {"type": "function", "function": {"name": name}}
    (choice,) = ask(client, tools=TOOLS, tool_choice=named).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", None, "function")
    assert call.function.name == name and json.loads(call.function.arguments)["host"] in ("heron", "owl")


def test_a_call_is_streamed_whole_and_no_part_of_it_is_text(client: openai.OpenAI) -> None:
    pieces = list(ask(client, tools=TOOLS, tool_choice="required", stream=True))
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    (called,) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert called[0].index == 0 and called[0].function.name in ("disk", "load")
    assert json.loads(called[0].function.arguments)["host"] in ("heron", "owl")
    assert not "".join(delta.content or "" for delta in deltas)
    assert pieces[-1].choices[0].finish_reason == "tool_calls"


def test_a_history_with_calls_and_their_answers_is_what_the_template_makes_of_it(client: openai.OpenAI) -> None:
    (call,) = ask(client, tools=TOOLS, tool_choice="required").choices[0].message.tool_calls
    called = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    told = {"role": "tool", "tool_call_id": call.id, "content": "96 %"}
    answer = ask(client, ASK, called, told, tools=TOOLS, tool_choice="none", max_tokens=4)
    plain = ask(client, ASK, told, tools=TOOLS, tool_choice="none", max_tokens=4)
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 10, "the call stands in the prompt"
    assert ask(client, max_tokens=4).usage.prompt_tokens < plain.usage.prompt_tokens, "so do the tools"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "find"}}}, "none of the tools"),
        ({"tools": [{"type": "function"}]}, "no function with a name"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "something else"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "must not hold tools"),
        ({"extra_body": {"max_token": 3}}, "did you mean max_tokens"),
    ],
)
def test_what_can_t_be_done_is_said(client: openai.OpenAI, more: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(client, **more)


def test_what_other_clients_send_is_taken_and_what_nothing_reads_is_told(client: openai.OpenAI) -> None:
    sent = {"repetition_penalty": 1.0, "top_k": 20, "min_p": 0.0, "guided_decoding_backend": "auto"}
    raw = client.chat.completions.with_raw_response.create(model="base", messages=[ASK], max_tokens=2, extra_body=sent)
    assert raw.headers["x-loractl-not-used"] == "guided_decoding_backend"
    drawn = {ask(client, max_tokens=8, temperature=2, seed=seed, extra_body={"top_k": 1}).choices[0].message.content
             for seed in range(3)}  # fmt: skip
    sure = {ask(client, max_tokens=8, temperature=2, seed=seed, extra_body={"min_p": 1}).choices[0].message.content
            for seed in range(3)}  # fmt: skip
    assert drawn == sure == {ask(client, max_tokens=8).choices[0].message.content}, "only the likeliest token is left"


def test_variables_of_the_template_s_own_reach_it(client: openai.OpenAI) -> None:
    before = ask(client, max_tokens=2).usage.prompt_tokens
    without = ask(client, max_tokens=2, extra_body={"chat_template_kwargs": {"no_marks": True}})
    assert without.usage.prompt_tokens == before, "this template has no such variable"


@pytest.mark.parametrize(
    "form",
    [
        CallForm(begin="<|im_start|>", end="<|endoftext|>", arguments="arguments"),
        CallForm(begin="<|im_start|>", end="", arguments="arguments", listed=True),
        LLAMA,
    ],
    ids=["marks of the tokenizer", "a list behind one", "no marks"],
)
def test_a_form_is_kept_where_its_marks_are_the_tokenizer_s_own(tiny_model: Path, form: CallForm) -> None:
    engine = engine_of(tiny_model)
    ids, text = engine.tokenizer("is heron full?").input_ids, list[str]()
    held = engine.forms.of_call(form, TOOLS[:1])
    engine.ask(Ask(prompt=ids, say=lambda said: text.append(said.text), max_new_tokens=120, form=held, marks=True))
    engine.finish()
    reader = CallReader(form)
    told = "".join(map(reader.add, text))
    left, (call,) = reader.end()
    assert not told + left and call["function"]["name"] == "disk"


ONE = '{"name": "disk", "arguments": {"host": "heron"}}'
READ = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", ["disk"]),
    (HERMES, f"Let me see.\n<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>", "Let me see.\n", ["disk"] * 2),
    (HERMES, "1 < 2 <tool", "1 < 2 <tool", []),
    (HERMES, '<tool_call>{"name": disk}</tool_call>', '<tool_call>{"name": disk}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "disk", "arguments": 5}</tool_call>', '<tool_call>{"name": "disk", "arguments": 5}'
     "</tool_call>", []),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {ONE}]", "", ["disk"] * 2),
    (MISTRAL, "[TOOLS] are none", "[TOOLS] are none", []),
    (LLAMA, ' {"name": "disk", "parameters": {"host": "heron"}}', "", ["disk"]),
    (LLAMA, 'As JSON: {"name": "disk", "parameters": {}}', 'As JSON: {"name": "disk", "parameters": {}}', []),
    (LLAMA, '{"host": "heron"}', '{"host": "heron"}', []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "said", "names"), READ)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_told_from_text_in_pieces_of_any_size(
    form: CallForm, text: str, said: str, names: list[str], size: int
) -> None:
    reader = CallReader(form)
    told = "".join(reader.add(text[begin : begin + size]) for begin in range(0, len(text), size))
    left, calls = reader.end()
    assert (told + left, [call["function"]["name"] for call in calls]) == (said, names)
    assert all(json.loads(call["function"]["arguments"]) == {"host": "heron"} for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)


def test_the_form_of_a_template_is_known_by_its_text() -> None:
    assert form_of(CALLS) is HERMES
    assert form_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert form_of("""{{ '<|start_header_id|>ipython' }}{{ '"parameters": ' }}""") is LLAMA
    assert form_of("{{ message.content }}") is None
