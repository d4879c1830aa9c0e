"""Answers on one base in memory: rows of several adapters in one batch say what each says alone."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.adapter_config import CONFIG, allowed
from loractl.common.artifacts import Binding, attempt_prefix
from loractl.common.errors import UsageError
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.serving.adapter_pool import AdapterPool, BaseChoice, NoRoom
from loractl.worker.serving.decoding import decoder as decoding
from loractl.worker.serving.decoding.decoder import Decoder, TooLong
from loractl.worker.serving.decoding.request import Ask, Said
from loractl.worker.serving.library import Arithmetic, Listed

PROMPTS = ["ticket one", "please answer the next line", "queue", "a network of storage, and one priority more", "gpu?"]


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with random weights: two plain ones, one of DoRA, one that replaces whole modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    kinds: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"r": 8, "target_modules": ["q_proj", "down_proj"]},
        "dora": {"use_dora": True},
        "whole": {"modules_to_save": ["lm_head"], "target_modules": ["v_proj"]},
    }
    found = {}
    for number, (name, options) in enumerate(kinds.items()):
        torch.manual_seed(number)
        config = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
        model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **config))
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path:
                parameter.data = parameter.data.flip(0)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(found[name])
        _as_stored(found[name])
    return found


def _as_stored(folder: Path) -> None:
    """Leave of peft's settings what a job stores."""
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(allowed(settings)))


def _listed(name: str, model: Path, folder: Path) -> Listed:
    size = (folder / "adapter_model.safetensors").stat().st_size
    spec = JobSpec.model_validate({"name": name, "base_model": str(model), "dataset": {"path": "x.jsonl"}})
    number = ["one", "two", "dora", "whole"].index(name) + 1
    return Listed(
        job_id=number, attempt=1, name=name, method=Method.LORA, size=size, created=0, spec=spec, data={},
        stored=Binding(prefix=attempt_prefix(number, 1), manifest_sha256=None),
    )  # fmt: skip


class Bench:
    """An engine, and what it said of each request."""

    def __init__(self, model: Path, adapters: dict[str, Path], memory: int | None = None, **limits: Any) -> None:
        self.pool = AdapterPool(BaseChoice(model=str(model), revision=None, dtype="float32"), memory)
        self.engine = Decoder(self.pool, **limits)
        self._adapters, self._model = adapters, model
        self.said: list[list[Said]] = []

    def ask(self, prompt: str, name: str | None, tokens: int = 24, **more: Any) -> Ask:
        heard: list[Said] = []
        self.said.append(heard)
        ask = Ask(
            prompt=self.pool.tokenizer(prompt).input_ids,
            say=heard.append,
            max_new_tokens=tokens,
            adapter=None if name is None else _listed(name, self._model, self._adapters[name]),
            folder=None if name is None else self._adapters[name],
            **more,
        )
        self.engine.ask(ask)
        return ask

    def answers(self) -> list[str]:
        self.engine.finish()
        assert all(heard[-1].ended in ("stop", "length") for heard in self.said), self.said
        return ["".join(one.text for one in heard) for heard in self.said]


@pytest.fixture
def bench(tiny_model: Path, adapters: dict[str, Path]) -> Callable[..., Bench]:
    return lambda **more: Bench(tiny_model, adapters, **more)


def _plain(model: Path, adapter: Path | None, prompts: Sequence[str], tokens: int = 24) -> list[str]:
    """What transformers and peft alone answer, one prompt at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    loaded.eval()
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = loaded.generate(**ids, max_new_tokens=tokens, do_sample=False)
        found.append(str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)))
    return found


def test_a_mixed_batch_answers_as_transformers_and_peft_alone(
    bench: Callable[..., Bench], adapters: dict[str, Path], tiny_model: Path
) -> None:
    names = ("one", None, "two", "whole", "dora")
    mixed = bench()
    for prompt in PROMPTS:
        for name in names:
            mixed.ask(prompt, name)
    answers = mixed.answers()
    for place, name in enumerate(names):
        assert answers[place :: len(names)] == _plain(tiny_model, adapters[name] if name else None, PROMPTS), name
    assert len(set(answers)) > 15, "adapters that say the same would prove nothing"
    assert set(mixed.pool.loaded) == {"job1", "job2", "job3", "job4"}


def test_the_prompts_of_a_mixed_batch_are_scored_as_peft_scores_each_alone(
    bench: Callable[..., Bench], adapters: dict[str, Path], tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    b = bench()
    for prompt, name in zip(PROMPTS, ("one", None, "two", "whole", "dora"), strict=True):
        b.ask(prompt, name, 1, logprobs=1, prompt_logprobs=True)
        b.ask(prompt, name, 1)
    b.answers()
    for heard, prompt, name in zip(b.said[::2], PROMPTS, ("one", None, "two", "whole", "dora"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        if name is not None:
            model = PeftModel.from_pretrained(model, str(adapters[name]))
        ids = b.pool.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = torch.log_softmax(model.eval()(input_ids=ids).logits[0], -1)
        told = [one for said in heard for one in said.scored]
        assert [one.token for one in told[:-1]] == ids[0].tolist() and told[0].logprob is None
        own = expected[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        assert [one.logprob for one in told[1:-1]] == pytest.approx(own, abs=1e-4), name
        assert [one.top[0][1] for one in told[1:]] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert not any(one for heard in b.said[1::2] for said in heard for one in said.scored)


def test_a_prompt_whose_logits_are_no_numbers_ends_alone(
    bench: Callable[..., Bench], adapters: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(adapters["one"], tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({key: value * torch.nan for key, value in weights.items()}, broken / "adapter_model.safetensors")
    b = bench()
    b._adapters = {**adapters, "one": broken}
    for name in ("one", "two"):
        b.ask(PROMPTS[0], name, 2, logprobs=1, prompt_logprobs=True)
    b.engine.finish()
    assert b.said[0][-1].error == "ValueError: the model's logits are not all numbers"
    assert b.said[1][-1].ended == "length"


@pytest.mark.long
def test_requests_that_come_and_go_at_any_time_change_no_answer(bench: Callable[..., Bench]) -> None:
    alone = bench(rows=1)
    many = bench(rows=3)
    lengths = [3, 17, 9, 30, 1, 12, 22, 5, 40, 8]
    asked = [(PROMPTS[n % 5], ("one", "two", None)[n % 3], lengths[n]) for n in range(10)]
    for prompt, name, tokens in asked:
        alone.ask(prompt, name, tokens)
    widths = set()
    for prompt, name, tokens in asked:
        many.ask(prompt, name, tokens)
        many.engine.step()  # the next one joins a batch that is under way
        widths.add(many.engine.running)
    assert max(widths) == 3
    assert many.answers() == alone.answers()
    assert many.engine.running == many.engine.waiting == 0


def test_a_stop_text_ends_an_answer_before_it_and_none_of_it_is_told(bench: Callable[..., Bench]) -> None:
    free = bench()
    free.ask(PROMPTS[1], "one", 40)
    (text,) = free.answers()
    stop = text[5:9]
    held = bench()
    held.ask(PROMPTS[1], "one", 40, stop=(stop, "never said"))
    (cut,) = held.answers()
    assert cut == text[: text.index(stop)] and held.said[0][-1].ended == "stop"


def test_draws_follow_their_seed_and_not_their_neighbours(bench: Callable[..., Bench]) -> None:
    one, other = bench(), bench()
    for seed in (7, 7, 8):
        one.ask(PROMPTS[0], "one", temperature=1.5, top_p=0.9, seed=seed)
    other.ask(PROMPTS[3], "two")
    other.ask(PROMPTS[0], "one", temperature=1.5, top_p=0.9, seed=7)
    first, again, another = one.answers()
    assert first == again == other.answers()[1]
    assert first != another
    greedy = bench()
    greedy.ask(PROMPTS[0], "one")
    greedy.ask(PROMPTS[0], "one", temperature=5.0, top_p=1e-9, seed=1)  # only the likeliest token is inside
    assert len(set(greedy.answers())) == 1


def test_a_cancelled_request_leaves_the_batch_and_the_others_go_on(bench: Callable[..., Bench]) -> None:
    reference = bench()
    reference.ask(PROMPTS[0], "two", 30)
    b = bench(rows=2)
    gone = b.ask(PROMPTS[1], "one", 400)
    b.ask(PROMPTS[0], "two", 30)
    never = b.ask(PROMPTS[2], "one", 400)
    for _ in range(4):
        b.engine.step()
    gone.cancelled.set()
    never.cancelled.set()
    b.engine.finish()
    assert [heard[-1].ended for heard in b.said] == ["cancelled", "length", "cancelled"]
    assert "".join(one.text for one in b.said[1]) == reference.answers()[0]
    assert b.said[0][-1].tokens < 10 and b.said[2][-1].tokens == 0


def test_adapters_are_evicted_by_memory_but_never_in_use(bench: Callable[..., Bench]) -> None:
    b = bench(memory=80_000)  # two of them
    for name in ("one", "two", "one", "dora", "two"):
        b.ask(PROMPTS[0], name, 6)
        b.engine.finish()
        assert len(b.pool.loaded) <= 2
    assert set(b.pool.loaded) == {"job3", "job2"}, "the longest unused went"
    assert b.said[0][-1] == b.said[2][-1] and b.answers()[0] == b.answers()[2], (
        "evicted and loaded again, it is the same"
    )
    b.ask(PROMPTS[0], "one", 30)
    b.ask(PROMPTS[0], "two", 30)
    b.ask(PROMPTS[0], "dora", 4)  # waits: both others are in use
    b.engine.step()
    assert b.engine.running == 2 and b.engine.waiting == 1
    b.answers()


def test_an_adapter_that_can_never_fit_is_refused_and_others_are_answered(bench: Callable[..., Bench]) -> None:
    b = bench(memory=10_000)
    b.ask(PROMPTS[0], "one")
    b.ask(PROMPTS[0], None)
    b.engine.finish()
    assert b.said[0][-1].ended == "error" and "may take" in (b.said[0][-1].error or "")
    assert b.said[1][-1].ended in ("stop", "length")


def test_the_cache_bounds_the_batch_and_a_request_beyond_it_is_refused(bench: Callable[..., Bench]) -> None:
    a_token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width of a head, fp32
    b = bench(cache_bytes=100 * a_token)
    assert b.engine.cache_tokens == 100
    for _ in range(4):
        b.ask(PROMPTS[0], "one", 30)
    widths = set()
    while b.engine.step():
        widths.add(b.engine.running)
    assert max(widths) == 2, "three would be 3 x 40 tokens"
    with pytest.raises(TooLong, match="tokens are more than 100"):
        b.ask(PROMPTS[0], "one", 99)
    with pytest.raises(TooLong, match="the prompt has 200 tokens, the model takes 100"):
        b.engine.room(200)


def test_the_models_own_context_is_the_other_bound(bench: Callable[..., Bench]) -> None:
    assert bench().engine.room(10) == 512 - 10


def test_a_failure_in_a_batch_is_told_and_the_next_request_is_answered(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    b.ask(PROMPTS[0], "one")
    b.ask(PROMPTS[1], "two")
    b.engine.step()
    whole = AdapterPool.forward

    def fails(self: AdapterPool, keys: Sequence[str], **tensors: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterPool, "forward", fails)
    b.engine.step()
    monkeypatch.setattr(AdapterPool, "forward", whole)
    assert [heard[-1].error for heard in b.said] == ["the device ran out of memory"] * 2
    del b.said[:]
    b.ask(PROMPTS[0], "one")
    assert b.answers()[0]


def test_a_failure_while_prompts_are_read_is_that_of_the_new_requests_alone(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = bench()
    reference.ask(PROMPTS[0], "one", 30)
    (expected,) = reference.answers()
    b = bench()
    b.ask(PROMPTS[0], "one", 30)
    b.engine.step()
    whole = AdapterPool.forward

    def fails_on_prompts(self: AdapterPool, keys: Sequence[str], **tensors: Any) -> Any:
        if tensors["input_ids"].shape[1] > 1:
            raise RuntimeError("prompt")
        return whole(self, keys, **tensors)

    monkeypatch.setattr(AdapterPool, "forward", fails_on_prompts)
    b.ask(PROMPTS[3], "two", 30)
    b.engine.finish()
    assert b.said[1][-1].error == "RuntimeError: prompt"
    assert "".join(one.text for one in b.said[0]) == expected


def test_a_card_that_fails_for_good_leaves_nobody_waiting(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some errors every call of CUDA's fails, that which frees memory too. Two lanes are to be opened then."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    b = bench()
    monkeypatch.setattr(AdapterPool, "forward", fails)
    monkeypatch.setattr(decoding, "release", fails)
    for name in ("one", "dora"):
        b.ask("queue", name)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        b.engine.step()
    b.engine.fail_all("over")
    assert ["illegal memory access" in str(heard[-1].error) for heard in b.said] == [True, True]


def test_an_adapter_of_another_base_is_refused_and_leaves_the_base_as_it_was(
    bench: Callable[..., Bench], adapters: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    fresh = bench()
    fresh.ask(PROMPTS[0], None)
    for first in (None, "two"):
        b = bench()
        if first:
            b.ask(PROMPTS[0], first, 2)
        wrong = tmp_path / f"wrong-{first}"
        wrong.mkdir()
        (wrong / "adapter_config.json").write_bytes((adapters["one"] / "adapter_config.json").read_bytes())
        weights = load_file(adapters["one"] / "adapter_model.safetensors")
        save_file({k: v.repeat(1, 2) for k, v in weights.items()}, wrong / "adapter_model.safetensors")
        b._adapters = {**adapters, "one": wrong}
        b.ask(PROMPTS[0], "one")
        b.ask(PROMPTS[0], None)
        b.engine.finish()
        assert "does not fit this base" in (b.said[-2][-1].error or "")
        assert "".join(one.text for one in b.said[-1]) == fresh.answers()[0]
        b._adapters = adapters
        del b.said[:]
        b.ask(PROMPTS[0], "one")
        assert b.answers()[0], "and the right one loads afterwards"


def test_a_hostile_configuration_holds_nobody_up(
    bench: Callable[..., Bench], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """As an expression it takes peft's matching longer than the machine will last."""
    hostile = tmp_path / "hostile"
    shutil.copytree(adapters["one"], hostile)
    settings = json.loads((hostile / CONFIG).read_text())
    (hostile / CONFIG).write_text(json.dumps({**settings, "target_modules": r"(\w+\.?)*!"}))
    b = bench()
    b._adapters = {**adapters, "one": hostile}
    b.ask(PROMPTS[0], "one")
    began = time.process_time()
    b.engine.finish()
    assert time.process_time() - began < 3
    assert "target_modules is not a list of at most 20000 names of modules" in (b.said[0][-1].error or "")


def test_files_that_have_gone_meanwhile_are_told_and_the_next_request_is_answered(
    bench: Callable[..., Bench], adapters: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    b = bench()
    listed = _listed("one", tiny_model, adapters["one"])
    heard: list[Said] = []
    ids = b.pool.tokenizer(PROMPTS[0]).input_ids
    b.engine.ask(Ask(prompt=ids, say=heard.append, max_new_tokens=4, adapter=listed, folder=tmp_path / "nowhere"))
    b.ask(PROMPTS[0], "one", 4)
    assert b.answers()[0]
    assert "are gone from" in (heard[-1].error or "")


def test_a_mixture_of_experts_answers_though_its_layers_lose_their_rows(tmp_path: Path, tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4,
        shared_expert_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    base = Qwen2MoeForCausalLM(config)
    base.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    made = LoraConfig(r=2, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, made).save_pretrained(tmp_path / "one")
    _as_stored(tmp_path / "one")
    b = Bench(tmp_path / "moe", {"one": tmp_path / "one"})
    for prompt in PROMPTS[:3]:
        b.ask(prompt, "one", 8)
        b.ask(prompt, None, 8)
    answers = b.answers()
    assert not b.pool.loaded["job1"].mixes
    assert answers[::2] == _plain(tmp_path / "moe", tmp_path / "one", PROMPTS[:3], 8)
    assert answers[1::2] == _plain(tmp_path / "moe", None, PROMPTS[:3], 8)


def test_what_cannot_be_drawn_ends_one_request_and_a_tiny_temperature_is_no_such_thing(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    b.ask(PROMPTS[0], "one", 6)
    b.ask(PROMPTS[0], "one", 6, temperature=1e-310)
    first, cold = b.answers()
    assert first == cold
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("NaN")))
    del b.said[:]
    b.ask(PROMPTS[0], "one", 6)
    b.ask(PROMPTS[0], "one", 6, temperature=1.0)
    b.engine.finish()
    assert "".join(one.text for one in b.said[0]) == first and b.said[1][-1].error == "RuntimeError: NaN"


def test_the_longest_stop_text_costs_no_more_than_what_is_held_back() -> None:
    import time

    from loractl.worker.serving.decoding.request import overlap

    stop = "ab" * 200_000
    began = time.process_time()
    assert overlap("xyabab", stop) == 4 and overlap("xyz", stop) == 0
    assert time.process_time() - began < 1


def test_who_can_step_no_more_tells_everybody(bench: Callable[..., Bench]) -> None:
    b = bench(rows=1)
    b.ask(PROMPTS[0], "one")
    b.engine.step()
    b.ask(PROMPTS[0], "two")
    b.engine.fail_all("over")
    assert [heard[-1].error for heard in b.said] == ["over", "over"]
    assert b.engine.running == b.engine.waiting == 0


def test_a_failing_layer_leaves_nothing_behind_in_the_model(bench: Callable[..., Bench]) -> None:
    """peft's own hooks for adapter_names stay in the model when a forward fails, and every later one fails too."""
    b = bench()
    b.ask(PROMPTS[0], "one")
    b.ask(PROMPTS[1], "two")
    b.engine.step()
    layer = b.pool.model.get_base_model().model.layers[1].mlp
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    b.engine.step()
    hook.remove()
    assert [heard[-1].error for heard in b.said] == ["RuntimeError: broken"] * 2
    del b.said[:]
    b.ask(PROMPTS[0], "one")
    b.ask(PROMPTS[1], "two")
    assert all(b.answers())


def test_characters_of_several_tokens_come_whole(tiny_model: Path, bench: Callable[..., Bench]) -> None:
    from loractl.worker.serving.decoding.request import TextStream

    tokenizer = bench().pool.tokenizer
    words = "naïve — 東京 🙂 done"
    text, heard = TextStream(tokenizer, ["xx"]), []
    for token in tokenizer(words).input_ids:
        heard.append(text.add(token)[0])
    heard.append(text.rest())
    assert "".join(heard) == words and len([one for one in heard if one]) > 8
    assert not any("\N{REPLACEMENT CHARACTER}" in one for one in heard)


def test_a_sliding_window_is_kept_and_a_model_without_keys_and_values_is_refused(
    tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    windowed = MistralConfig(
        **shape, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, sliding_window=6
    )  # fmt: skip
    MistralForCausalLM(windowed).save_pretrained(tmp_path / "mistral")
    MambaForCausalLM(MambaConfig(**shape, state_size=4)).save_pretrained(tmp_path / "mamba")
    for name in ("mistral", "mamba"):
        tokenizer.save_pretrained(tmp_path / name)
    b = Bench(tmp_path / "mistral", {})
    for prompt in PROMPTS:
        b.ask(prompt, None)
    assert b.answers() == _plain(tmp_path / "mistral", None, PROMPTS)
    with pytest.raises(UsageError, match="can't be served"):
        Bench(tmp_path / "mamba", {})


def test_the_base_in_nf4_answers_in_mixed_batches_too(tiny_model: Path, adapters: dict[str, Path]) -> None:
    b = Bench(tiny_model, adapters)
    b.pool = AdapterPool(BaseChoice(model=str(tiny_model), revision=None, method=Method.QLORA, dtype="float32"))
    b.engine = Decoder(b.pool)
    asked = [(prompt, name) for prompt in PROMPTS[:2] for name in ("one", "two", None)]
    for prompt, name in asked:
        b.ask(prompt, name, 8)
        b.engine.finish()
    for prompt, name in asked:
        b.ask(prompt, name, 8)
    answers = b.answers()
    assert answers[: len(asked)] == answers[len(asked) :]


@pytest.mark.parametrize(("exact", "rest"), [(True, torch.float32), (False, torch.bfloat16)])
def test_beside_nf4_all_else_is_in_the_format_of_the_training(tiny_model: Path, exact: bool, rest: torch.dtype) -> None:
    choice = BaseChoice(model=str(tiny_model), revision=None, method=Method.QLORA, dtype="bfloat16", exact=exact)
    pool = AdapterPool(choice)
    assert {each.dtype for each in pool.model.parameters() if each.is_floating_point()} == {rest}
    assert pool.number_format == ("NF4, all else in fp32" if exact else "NF4")


def test_a_format_that_a_person_asks_for_goes_before_that_of_the_training(tiny_model: Path) -> None:
    """What a processor can't compute in gives way where it was the training's, and is refused where it is asked for."""
    trained = Arithmetic(method=Method.QLORA, dtype="float16", exact=True)
    usual = BaseChoice.of(("m", "r1"), trained, "cpu", run_code=True)
    kept = BaseChoice(model="m", revision="r1", method=Method.QLORA, device="cpu", exact=True, run_code=True)
    assert usual == kept
    assert BaseChoice.of(("m", None), trained, "cuda", run_code=False).dtype == "float16"
    with pytest.raises(TrainingFailed, match="float16 is for GPUs"):
        AdapterPool(BaseChoice.of((str(tiny_model), None), Arithmetic(), "cpu", dtype="float16", run_code=False))


def test_asking_is_for_any_thread_and_waiting_ends_when_somebody_asks(bench: Callable[..., Bench]) -> None:
    b = bench()
    timer = threading.Timer(0.2, lambda: b.ask(PROMPTS[0], None, 4))
    timer.start()
    b.engine.wait(60)
    assert b.engine.waiting == 1
    b.answers()


def test_no_room_is_for_waiting_and_too_large_for_refusing(
    tiny_model: Path, adapters: dict[str, Path], bench: Callable[..., Bench]
) -> None:
    pool = bench(memory=80_000).pool
    first = pool.hold(_listed("one", tiny_model, adapters["one"]), adapters["one"])
    second = pool.hold(_listed("two", tiny_model, adapters["two"]), adapters["two"])
    with pytest.raises(NoRoom):
        pool.hold(_listed("dora", tiny_model, adapters["dora"]), adapters["dora"])
    pool.let_go(first)
    assert pool.hold(_listed("dora", tiny_model, adapters["dora"]), adapters["dora"]).mixes is False
    assert set(pool.loaded) == {second.key, "job3"}
