"""Several choices, log-probabilities and lists of prompts through loractl serve, by the official openai client."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from loractl.worker.serving.decoding import lane
from loractl.worker.serving.decoding.decoder import Decoder
from loractl.worker.serving.decoding.logprobs import TextForm, TokenLogprob, TokenTexts
from loractl.worker.serving.http import application as http

from ..served import engine_of, served

ASK = {"role": "user", "content": "queue"}
TEXTS = ["queue priority storage network please", "a 🦉 is naïve", "answer"]
CLOSE = 1e-4


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Decoder:
    return engine_of(tiny_model)


@pytest.fixture(scope="module")
def client(engine: Decoder, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with (
        served(engine, tiny_model, tmp_path_factory.mktemp("home")) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as asking,
    ):
        yield asking


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    """The same model by transformers alone: log-probabilities of the token behind each place, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def logprobs(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(input_ids=torch.tensor([list(ids)])).logits[0], -1)

    return logprobs


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "base", "messages": [ASK], "max_tokens": 8, **more})


def complete(client: openai.OpenAI, prompt: Any, **more: Any) -> Any:
    return client.completions.create(**{"model": "base", "prompt": prompt, "max_tokens": 8, **more})


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_are_drawn_by_the_seeds_that_follow_the_first(client: openai.OpenAI, stream: bool) -> None:
    hot = {"temperature": 1.5, "n": 3, "seed": 7}
    alone = [chat(client, **{**hot, "n": 1, "seed": seed}) for seed in (7, 8, 9)]
    expected = [one.choices[0].message.content for one in alone]
    assert len(set(expected)) == 3
    if not stream:
        done = chat(client, **hot)
        assert [choice.index for choice in done.choices] == [0, 1, 2]
        assert [choice.message.content for choice in done.choices] == expected
        usage = done.usage
    else:
        texts = ["", "", ""]
        events = list(chat(client, **hot, stream=True, stream_options={"include_usage": True}))
        for choice in (choice for event in events for choice in event.choices):
            texts[choice.index] += choice.delta.content or ""
        assert texts == expected
        roles = [choice.index for event in events for choice in event.choices if choice.delta.role]
        assert sorted(roles) == [0, 1, 2] and sum(bool(c.finish_reason) for e in events for c in e.choices) == 3
        usage = events[-1].usage
    assert usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_answered_in_their_order_as_text_or_as_tokens(
    client: openai.OpenAI, engine: Decoder, stream: bool
) -> None:
    ids = [engine.tokenizer(text).input_ids for text in TEXTS]
    hot = {"temperature": 1.5, "seed": 3, "n": 2}
    expected = [complete(client, text, temperature=1.5, seed=seed).choices[0].text for text in TEXTS for seed in (3, 4)]
    for prompts in (TEXTS, ids, [TEXTS[0], *ids[1:]]):
        if not stream:
            done = complete(client, prompts, **hot)
            assert [choice.index for choice in done.choices] == list(range(6))
            assert [choice.text for choice in done.choices] == expected
            assert done.usage.prompt_tokens == sum(map(len, ids))
        else:
            texts = [""] * 6
            for event in complete(client, prompts, **hot, stream=True):
                texts[event.choices[0].index] += event.choices[0].text
            assert texts == expected
    assert complete(client, ids[0], temperature=1.5, seed=3).choices[0].text == expected[0], "one list is one prompt"


def test_answers_of_one_request_share_each_pass(
    client: openai.OpenAI, engine: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = lane.Lane._forward

    def counted(self: Any, some: Any, *more: Any, **keys: Any) -> Any:
        rows.append(len(some))
        return forward(self, some, *more, **keys)

    monkeypatch.setattr(lane.Lane, "_forward", counted)
    complete(client, TEXTS, n=2, max_tokens=1, logprobs=1, echo=True)
    assert rows == [6]


@pytest.mark.parametrize("draw", [{"temperature": 0}, {"temperature": 1.7, "seed": 5, "extra_body": {"top_k": 9}}])
def test_a_chat_s_logprobs_are_the_model_s_own_distribution(
    client: openai.OpenAI, engine: Decoder, plain: Any, draw: dict[str, Any]
) -> None:
    choice = chat(client, logprobs=True, top_logprobs=5, **draw).choices[0]
    content = choice.logprobs.content
    prompt = engine.tokenizer.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False)
    ids = engine.tokenizer(prompt, add_special_tokens=False).input_ids
    text = b"".join(bytes(one.bytes) for one in content).decode(errors="replace")
    assert text == choice.message.content + ("" if choice.finish_reason == "length" else "<|im_end|>")
    for one in content:
        expected = plain(ids)[-1]
        best = expected.topk(5)
        assert [t.logprob for t in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=CLOSE)
        near = (expected - one.logprob).abs().argsort()
        token = next(int(t) for t in near if engine.tokenizer.decode([int(t)]) == one.token or t == near[0])
        assert abs(float(expected[token]) - one.logprob) < CLOSE
        ids = [*ids, token]


@pytest.mark.parametrize("at_once", [2**26, 400 * 3 * 4], ids=["in one pass", "four columns a pass"])
def test_an_echoed_prompt_is_scored_as_transformers_does(
    client: openai.OpenAI, engine: Decoder, plain: Any, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Prompts of several lengths in one batch, padded, and read in parts."""
    monkeypatch.setattr(lane, "MOST_LOGITS", at_once)
    ids = [engine.tokenizer(text).input_ids for text in TEXTS]
    done = complete(client, ids, max_tokens=1, logprobs=3, echo=True, temperature=0)
    for prompt, choice in zip(ids, done.choices, strict=True):
        expected, told = plain(prompt), choice.logprobs
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        own = [float(expected[n, token]) for n, token in enumerate(prompt[1:])]
        assert told.token_logprobs[1:-1] == pytest.approx(own, abs=CLOSE)
        for values, likely in zip(expected, told.top_logprobs[1:], strict=True):
            assert sorted(likely.values())[-3:] == pytest.approx(sorted(values.topk(3).values.tolist()), abs=CLOSE)
        assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values()), "the likeliest is drawn"


def test_each_token_s_place_in_the_text_is_told_also_of_half_a_character(client: openai.OpenAI) -> None:
    for text in TEXTS:
        choice = complete(client, text, logprobs=1, echo=True, max_tokens=4).choices[0]
        told = choice.logprobs
        assert choice.text.startswith(text) and len(told.tokens) == len(told.text_offset)
        for token, begin, end in zip(told.tokens, told.text_offset, [*told.text_offset[1:], None], strict=True):
            if not token.startswith("bytes:"):
                assert choice.text[begin:end] == token
    owl = complete(client, "🦉", logprobs=1, echo=True, max_tokens=0).choices[0]
    assert owl.text == "🦉" and owl.logprobs.text_offset == [0] * 4
    assert owl.logprobs.tokens == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x89"]


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_are_those_of_the_whole_answer(client: openai.OpenAI, echo: bool) -> None:
    asked = {"logprobs": 2, "echo": echo, "temperature": 1.5, "seed": 1}
    whole = complete(client, TEXTS[1], **asked).choices[0]
    pieces = [event.choices[0] for event in complete(client, TEXTS[1], **asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = list(itertools.chain.from_iterable(getattr(piece.logprobs, name) for piece in pieces))
        assert streamed == getattr(whole.logprobs, name)
    asked = {"logprobs": True, "top_logprobs": 1, "temperature": 1.5, "seed": 1}
    content = [
        one
        for event in chat(client, **asked, stream=True)
        for choice in event.choices
        for one in choice.logprobs.content
    ]
    assert content == chat(client, **asked).choices[0].logprobs.content and len(content) > 3


def test_a_prompt_alone_is_scored_up_to_the_whole_context(client: openai.OpenAI, engine: Decoder, plain: Any) -> None:
    ids = [3 + n % 290 for n in range(engine.context)]
    done = complete(client, ids, max_tokens=0, logprobs=0, echo=True)
    told = done.choices[0].logprobs.token_logprobs
    assert done.choices[0].finish_reason == "length" and done.usage.completion_tokens == 0
    expected = plain(ids)
    assert told[1:] == pytest.approx([float(expected[n, token]) for n, token in enumerate(ids[1:])], abs=CLOSE)
    assert complete(client, "queue", max_tokens=0, echo=True).choices[0].text == "queue"


def test_what_is_echoed_comes_before_the_answer_without_logprobs_too(client: openai.OpenAI) -> None:
    plain = complete(client, TEXTS[0])
    assert complete(client, TEXTS[0], echo=True).choices[0].text == TEXTS[0] + plain.choices[0].text
    assert complete(client, TEXTS[0], best_of=1).choices == plain.choices
    many = complete(client, TEXTS[0], n=2, best_of=3, temperature=0)
    assert [choice.text for choice in many.choices] == [plain.choices[0].text] * 2


def test_each_choice_keeps_a_form_of_its_own(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"queue": {"enum": ["gpu", "network"]}}, "required": ["queue"]}
    form = {"type": "json_schema", "json_schema": {"name": "q", "schema": {**schema, "additionalProperties": False}}}
    done = chat(client, n=3, seed=1, temperature=1.5, max_tokens=99, response_format=form, logprobs=True)
    assert all(json.loads(choice.message.content)["queue"] in ("gpu", "network") for choice in done.choices)
    assert all(choice.logprobs.content for choice in done.choices)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": ["x"] * 65, "n": 2}, "65 prompts with n 2 are 130 answers; from 1 to 128 can be"),
        ({"prompt": []}, "from 1 to 128"),
        ({"prompt": [[]]}, "a text, a list of token ids, or a list of such"),
        ({"prompt": [5, "x"]}, "a text, a list of token ids, or a list of such"),
        ({"prompt": [True]}, "a text, a list of token ids, or a list of such"),
        ({"prompt": [3, 400]}, "there is no token 400: the model has those from 0 to"),
        ({"prompt": [[3], [-1]]}, "there is no token -1"),
        ({"prompt": [3] * 512}, "the prompt has 512 tokens, the model takes 512 with its answer"),
        ({"best_of": 2}, r"best_of must be n \(1\) here"),
        ({"n": 2, "best_of": 1, "temperature": 0}, r"best_of must be n \(2\) here"),
        ({"logprobs": 21}, "logprobs must be at most 20"),
        ({"extra_body": {"logprobs": True}}, "must be a whole number here"),
        ({"extra_body": {"top_logprobs": 2}}, "top_logprobs is not supported here"),
        ({"max_tokens": 0}, "max_tokens must be at least 1 where echo is not set"),
    ],
)
def test_what_can_t_be_done_is_said(client: openai.OpenAI, more: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        complete(client, **{"prompt": "queue", **more})


def test_no_request_may_ask_for_more_numbers_than_memory_should_hold(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MOST_LOGPROBS", 100)
    complete(client, [3] * 20, echo=True, max_tokens=5, logprobs=3)
    with pytest.raises(openai.BadRequestError, match="of up to 26 tokens, with 3 likely ones each, are too many: 100"):
        complete(client, [3] * 20, echo=True, max_tokens=6, logprobs=3)
    monkeypatch.setattr(http, "MOST_WAITING", 3)
    with pytest.raises(openai.InternalServerError, match="0 answers wait already, 3 may"):
        chat(client, n=4)


def test_what_it_does_not_have_is_a_404_that_says_what_it_has(client: openai.OpenAI) -> None:
    for name, ask in (
        ("embeddings", lambda: client.embeddings.create(model="base", input="x")),
        ("responses", lambda: client.responses.create(model="base", input="x")),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            ask()
        what = f"loractl serve does not have /v1/{name}; it has /v1/chat/completions, /v1/completions and /v1/models"
        assert refused.value.body["message"] == what


def test_places_are_told_where_a_tokenizer_has_spaces_in_its_tokens_and_bytes_for_the_rest() -> None:
    """As sentencepiece's have; a text's first space is not in the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -3.0), ("▁a", -1.0), ("▁host", -1.0), (".", -2.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    text = "a host. 🦉."
    ids = [1, *tokenizer(text, add_special_tokens=False).input_ids]
    told = TextForm(TokenTexts(tokenizer)).part([TokenLogprob(token, -1.0) for token in ids], text)
    places = told["text_offset"]
    assert told["tokens"][:5] == ["<s>", " a", " host", ".", " "] and told["tokens"][5] == "bytes:\\xf0"
    assert [text[a:b] for a, b in itertools.pairwise([*places, None])] == [
        "", "a", " host", ".", " ", "", "", "", "🦉", ".",
    ]  # fmt: skip


def test_a_caller_who_leaves_while_the_answer_comes_frees_the_place(
    client: openai.OpenAI, engine: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "GONE_S", 0.05)
    step, steps = lane.Lane.step, []

    def slowly(self: lane.Lane) -> None:
        steps.append(1)
        time.sleep(0.01)
        step(self)

    monkeypatch.setattr(lane.Lane, "step", slowly)
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.1), n=2, temperature=2, max_tokens=450)
    while engine.running or engine.waiting:
        time.sleep(0.01)
    assert len(steps) < 300, "it was not answered to its end"


@pytest.mark.long
def test_tokens_come_back_as_text_as_far_as_a_prompt_may_be_long(client: openai.OpenAI, engine: Decoder) -> None:
    address = str(client.base_url.join("/detokenize"))
    ids = engine.tokenizer(TEXTS[0]).input_ids

    def text_of(tokens: list[int]) -> Any:
        return client.post(address, body={"tokens": tokens}, cast_to=dict[str, Any])["prompt"]

    assert text_of(ids) == TEXTS[0] and text_of(engine.longest * ids[:1])
    with pytest.raises(openai.BadRequestError, match=f"{engine.longest} with its answer"):
        text_of((engine.longest + 1) * ids[:1])
