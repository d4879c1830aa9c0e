"""What the comparison of base and tuned says, on scores whose answer is known."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loractl.common.job.method import Method
from loractl.common.job.sections import Metric
from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import Precision, choose_precision
from loractl.worker.base.gauge import in_batches
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Learner, load_base, load_tokenizer, positions_of
from loractl.worker.evaluation.answers import ROUGE, Answer, answer_metrics, rouge
from loractl.worker.evaluation.comparison import (
    BOOTSTRAP_SEED,
    Compared,
    Labels,
    Measure,
    compare_shares,
    draws,
    label_metrics,
    paired_interval,
)
from loractl.worker.evaluation.evaluation import EvaluationTask, evaluate
from loractl.worker.evaluation.report import verdict
from loractl.worker.evaluation.row_losses import LOSS, generate
from loractl.worker.protocol.messages import Note, Start, Stepped
from loractl.worker.recipe.rows import prepare_rows

from ..models import write_helpdesk
from .conftest import Recipe

RNG = np.random.default_rng(3)


def compared(
    base: np.ndarray, tuned: np.ndarray, weight: np.ndarray, name: str = "loss", *, higher: bool = False
) -> Compared:
    b, t, low, high = paired_interval(base, tuned, weight)
    cases = int((weight > 0).sum())
    return Measure(name=name, label=name, higher_is_better=higher).compared(cases, b, t, low, high)


def test_a_clear_gain_is_better_and_a_clear_loss_is_worse() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    assert compared(base, base - 5, tokens).reading == "better"
    assert compared(base, base + 5, tokens).reading == "worse"
    assert compared(base, base + 5, tokens, higher=True).reading == "better"


def test_noise_around_zero_is_no_clear_change() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    noise = RNG.normal(0, 2, 40)
    same = compared(base, base + noise - noise.mean(), tokens)
    assert same.reading == "no clear change"
    said = verdict([same])
    assert said["reading"] == "no_clear_change" and said["sentence"].startswith("No clear change: held-out loss ")


def test_a_model_that_did_not_change_has_an_interval_of_nothing() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    same = compared(base, base, tokens)
    assert (same.low, same.high, same.reading) == (0, 0, "no clear change")


def test_few_rows_are_too_few_however_large_the_change() -> None:
    said = verdict([compared(np.full(3, 50.0), np.full(3, 10.0), np.full(3, 10.0))])
    assert said["reading"] == "cant_be_judged" and said["why"] == "3 held-out rows are too few"


@pytest.mark.parametrize(("turned", "reading"), [(5, "no clear change"), (6, "better")])
def test_a_few_answers_that_all_turned_one_way_are_no_clear_change(turned: int, reading: str) -> None:
    """Five of five do so one time in sixteen, and the bootstrap's interval leaves out zero from four on."""
    found = compare_shares("exact_match", "exact match", [False] * 20, [n < turned for n in range(20)])
    assert (found.base, found.tuned, found.reading) == (0, 5 * turned, reading)
    back = compare_shares("exact_match", "exact match", [n < turned for n in range(20)], [False] * 20)
    assert back.reading == reading.replace("better", "worse")


@pytest.mark.parametrize(
    ("turned", "reading", "said"), [(5, "no clear change", "better_by_loss"), (6, "better", "better")]
)
def test_macro_f1_and_rouge_of_a_few_turned_answers_are_no_clear_change_either(
    turned: int, reading: str, said: str
) -> None:
    """They follow the same few answers: macro F1 alone made a verdict better that accuracy left open."""
    expected = [f"{('open', 'shut')[n % 2]} case" for n in range(24)]
    wrong = [f"{('shut', 'open')[n % 2]} case" if n < turned else text for n, text in enumerate(expected)]
    tokens, losses = np.full(24, 10.0), RNG.normal(30, 1, 24)
    gain = LOSS.compare(losses, losses - 5, tokens)
    for base, tuned, word in ((wrong, expected, "better"), (expected, wrong, "worse")):
        labels = label_metrics(Labels.of(["open case", "shut case"], expected, base, tuned))
        answers = [
            Answer(row=n, prompt="", expected=e, base=b, tuned=t, base_ended=True, tuned_ended=True)
            for n, (e, b, t) in enumerate(zip(expected, base, tuned, strict=True))
        ]
        texts = answer_metrics(answers, {Metric.EXACT_MATCH, Metric.ROUGE})[:-1]
        assert [one.reading for one in (*labels, *texts)] == [reading.replace("better", word)] * 6
        if word == "better":
            assert verdict([gain, *labels])["reading"] == verdict([gain, *texts])["reading"] == said


def test_answers_that_came_nearer_count_less_those_that_went_away() -> None:
    base, each = np.full(20, 50.0), np.ones(20)
    change = np.array([40.0] * 9 + [-1.0] * 4 + [0.0] * 7)
    near = Measure(name="rougeL", label="ROUGE-L", unit="%", higher_is_better=True)
    assert near.compare(base, base + change, each).reading == "no clear change", "9 - 4 are fewer than six"
    assert near.compare(base, base - change, each).reading == "no clear change"
    change[9] = 0
    assert near.compare(base, base + change, each).reading == "better"
    assert near.compare(base, base - change, each).reading == "worse"
    few = np.array([40.0] * 4 + [0.0] * 16)
    margin = Measure(name="margin", label="margin", higher_is_better=True)
    assert margin.compare(base, base + few, each).reading == "better", "it is no share"


def test_macro_f1_is_no_better_where_as_many_answers_are_right_as_before() -> None:
    """Twelve of "rare" became right and twelve of "often" wrong."""
    expected = ["often"] * 100 + ["rare"] * 12
    accuracy, macro = label_metrics(
        Labels.of(["often", "rare"], expected, ["often"] * 112, ["rare"] * 12 + expected[12:])
    )
    assert (accuracy.change, accuracy.reading) == (0, "no clear change")
    assert macro.change > 30 and macro.reading == "no clear change"


def test_rows_weigh_by_their_tokens() -> None:
    base, tuned, low, high = paired_interval(np.array([10.0, 300.0]), np.array([10.0, 100.0]), np.array([10.0, 100.0]))
    assert (base, tuned) == pytest.approx((310 / 110, 110 / 110))
    assert low <= tuned - base <= high


def test_a_change_that_is_the_same_for_each_token_is_certain_however_long_its_rows_are() -> None:
    tokens = np.array([5.0, 40, 0, 10, 200, 7, 0, 90, 3, 12])
    base = 3 * tokens
    found = LOSS.compare(base, base - 0.5 * tokens, tokens)
    assert (found.low, found.high) == pytest.approx((-0.5, -0.5))
    assert found.cases == 8, "a row without tokens is none"


def test_the_interval_covers_the_true_change_about_95_times_in_100() -> None:
    covered = 0
    for n in range(60):
        rng = np.random.default_rng(BOOTSTRAP_SEED + n)
        base = rng.normal(3, 1, 50)
        _, _, low, high = paired_interval(base, base + rng.normal(-0.5, 1, 50), np.ones(50))
        covered += low <= -0.5 <= high
    assert covered >= 52, f"{covered} of 60"


def test_of_twelve_on_noise_the_winner_s_final_rows_call_it_no_better() -> None:
    """The held-out rows, which chose it, call it better in a quarter of the sweeps. One in forty is what an interval of
    95 % allows."""
    rng, rows = np.random.default_rng(2), 40
    said: dict[str, list[str]] = {"held out": [], "final": []}
    for _ in range(12):
        weight, noise = rng.integers(5, 40, 2 * rows).astype(float), rng.normal(0, 0.4, (12, 2 * rows))
        base, tuned = 3.0 * weight, weight * (3.0 + noise)
        winner = tuned[tuned[:, :rows].sum(1).argmin()]
        for which, part in (("held out", slice(rows)), ("final", slice(rows, None))):
            said[which].append(LOSS.compare(base[part], winner[part], weight[part]).reading)
    assert said["held out"].count("better") >= 3
    assert said["final"].count("better") <= 1


def test_a_gain_in_loss_names_what_got_worse() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    better = compared(base, base - 5, tokens)
    worse = compared(np.full(40, 100.0), np.zeros(40), np.ones(40), name="exact match", higher=True)
    assert verdict([better, worse])["aside"] == "Worse on exact match."


def test_a_number_that_is_not_finite_is_never_called_better() -> None:
    tokens, base = np.full(40, 10.0), RNG.normal(30, 3, 40)
    assert compared(base, np.full(40, np.nan), tokens).reading == "not known"


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_loss_that_is_no_number_on_one_row_is_not_said_to_have_no_gain(side: str, number: float) -> None:
    losses = {"base": np.full(20, 20.0), "tuned": np.full(20, 5.0)}
    losses[side][3] = number
    loss = LOSS.compare(losses["base"], losses["tuned"], np.full(20, 10.0))
    told = verdict([loss])
    assert (loss.reading, loss.unmeasured, told["reading"]) == ("not known", 1, "cant_be_judged")
    assert told["why"] == "the loss is not a number for 1 of 20 held-out rows" and "–" in told["short"]
    assert told["short"].startswith(f"can't be judged: {told['why']}, loss ")
    assert told["sentence"].startswith(f"Can't be judged: {told['why']}; held-out loss ")


def test_out_of_memory_halves_the_batch_and_every_row_is_still_scored_once() -> None:
    done: list[int] = []
    sizes: list[int] = []

    def work(chosen: list[int]) -> None:
        sizes.append(len(chosen))
        if len(chosen) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(chosen)

    in_batches(list(range(9)), 8, work)
    assert done == list(range(9))
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        in_batches([1], 8, lambda chosen: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))


def test_labels_are_counted_as_by_hand() -> None:
    labels = Labels.of(["a", "b"], ["a", "a", "a", "b"], ["a", "b", "I think a", "b"], ["a", " a", "a", "a"])
    assert labels.names == ["a", "b", "other"]
    assert labels.confusion(labels.base) == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert labels.confusion(labels.tuned) == [[3, 0, 0], [1, 0, 0], [0, 0, 0]]
    base, tuned, low, high = labels.macro_f1()
    assert base == pytest.approx(100 * (2 / 4 + 2 / 3) / 2)
    assert tuned == pytest.approx(100 * (6 / 7 + 0) / 2)
    assert low < tuned - base < high


def test_the_macro_f1_of_a_sample_is_over_the_labels_that_it_expects() -> None:
    """As that of all rows is: a rare label that a sample lacks is no zero in it because somebody answered it."""
    expected = ["a"] * 12 + ["b"] * 6 + ["c"] * 2
    labels = Labels.of("abc", expected, ["a"] * 6 + ["c"] * 6 + ["b"] * 6 + ["a", "c"], [*expected[:-2], "a", "c"])

    def macro(answers: list[int], times: np.ndarray) -> float:
        found = []
        for label in range(3):
            there, said = (np.array(places) == label for places in (labels.expected, answers))
            if times @ there:
                found.append(200 * (times @ (there & said)) / (times @ there + times @ said))
        return float(np.mean(found))

    changes = [macro(labels.tuned, row) - macro(labels.base, row) for some in draws(20) for row in some]
    assert labels.macro_f1()[2:] == pytest.approx(tuple(np.percentile(changes, [2.5, 97.5])))


def test_no_answer_is_right_where_a_text_is_expected_that_is_no_label() -> None:
    labels = Labels.of(["a", "b"], ["a", "neither", "neither"], ["b", "some words", "a"], ["a", "neither", "b"])
    accuracy, macro = label_metrics(labels)
    assert (accuracy.base, accuracy.tuned) == (0.0, pytest.approx(100 / 3))
    assert (macro.base, macro.tuned) == (0.0, pytest.approx(100 * (1 + 0) / 2))


@pytest.mark.parametrize(
    ("answer", "expected", "two_of_three"),
    [
        ("the disk is_full", "The DISK, is full!", None),
        ("диск переполнен", "Диск переполнен.", None),
        ("磁盘已满", "磁盘已满。", None),
        ("डिस्क भरी है", "डिस्क भरी थी", "rouge1"),
        ("", "full", 0.0),
    ],
)
def test_rouge_knows_the_words_of_any_script(answer: str, expected: str, two_of_three: str | float | None) -> None:
    found = {kind: float(values[0]) for kind, values in rouge([answer], [expected]).items()}
    if isinstance(two_of_three, str):
        assert found[two_of_three] == pytest.approx(200 / 3)
    else:
        assert set(found.values()) == {100.0 if two_of_three is None else two_of_three}


@pytest.mark.parametrize(
    ("answer", "expected", "figures"),
    [
        ("on the mat the cat sat", "the cat lay on a mat and the mat lay", (62.5, 28.57143, 37.5)),
        ("b a b a b", "a b", (57.14286, 40.0, 57.14286)),
        ("word", "word", (100.0, 0.0, 100.0)),
        ("one two", "three", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_counts_words_pairs_and_the_longest_common_subsequence(
    answer: str, expected: str, figures: tuple[float, float, float]
) -> None:
    """The figures are those of rouge-score 0.1.2."""
    found = rouge([answer], [expected])
    assert [float(found[kind][0]) for kind in ("rouge1", "rouge2", "rougeL")] == pytest.approx(figures, abs=1e-4)


@pytest.mark.long
@hypothesis.given(st.lists(st.tuples(*[st.lists(st.sampled_from("abcde"), max_size=12).map(" ".join)] * 2), max_size=5))
def test_rouge_is_rouge_score_s(pairs: list[tuple[str, str]]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([*ROUGE])
    right = [scorer.score(expected, answer) for answer, expected in pairs]
    found = rouge([answer for answer, _ in pairs], [expected for _, expected in pairs])
    for kind, figures in found.items():
        assert list(figures) == [100 * one[kind].fmeasure for one in right]


def test_a_prompt_that_is_longer_than_any_row_is_not_answered(recipe: Recipe, tmp_path: Path) -> None:
    """Of a conversation that was cut, whose last question lies behind the cut."""
    long = [(f"ticket {n}", "queue: gpu") for n in range(30)]
    held_out = conversations(tmp_path / "held-out.jsonl", [[("ticket 1", "queue: storage")], long])
    asked = {"samples": 2, "max_new_tokens": 2, "metrics": ["loss", "exact_match"]}
    ended, _ = recipe("a", max_steps=1, dataset={"eval_path": str(held_out), "max_length": 64}, evaluation=asked)
    found = evaluation(tmp_path / "a")
    assert ended.reason is Reason.OK and found["rows"] == 2
    assert [answer["row"] for answer in found["answers"]] == [1]


NAMED_AS_IN_GPT2 = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
NAMED_AS_IN_LLAMA = {
    "max_position_embeddings": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
BOUNDED = {
    "gpt2": NAMED_AS_IN_GPT2,
    "openai-gpt": NAMED_AS_IN_GPT2,
    "gpt_bigcode": NAMED_AS_IN_GPT2,
    "gptj": NAMED_AS_IN_GPT2 | {"rotary_dim": 8},
    "codegen": NAMED_AS_IN_GPT2 | {"n_ctx": 32, "n_head": 4, "rotary_dim": 4},
    "ctrl": NAMED_AS_IN_GPT2 | {"dff": 32},
    "gpt_neo": {"max_position_embeddings": 32, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    | {"attention_types": [[["global"], 1]]},
    "opt": NAMED_AS_IN_LLAMA | {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "biogpt": NAMED_AS_IN_LLAMA,
    "mpt": {"max_seq_len": 32, "d_model": 32, "n_layers": 1, "n_heads": 2},
}
UNBOUNDED = {
    "llama": NAMED_AS_IN_LLAMA,
    "phi": NAMED_AS_IN_LLAMA,
    "gpt_neox": NAMED_AS_IN_LLAMA,
    "xglm": {"max_position_embeddings": 32, "d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize("family", [*BOUNDED, *UNBOUNDED])
def test_answers_end_where_a_table_of_positions_ends(family: str, tiny_model: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(str(tiny_model))
    marks = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 2, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(family, **{**BOUNDED, **UNBOUNDED}[family], **marks)
    model, made = AutoModelForCausalLM.from_config(config).eval(), list[int]()
    model.generation_config.min_new_tokens = 16
    model.register_forward_hook(lambda *_: made.append(1))
    with torch.no_grad():
        answers = generate(model, tokenizer, [[5] * 28, [5] * 9], 2, 16)
    assert len(answers) == 2
    assert (positions_of(model), len(made)) == ((32, 4) if family in BOUNDED else (None, 16))


@pytest.mark.parametrize(("family", "table"), [("gpt2", "wpe"), ("opt", "embed_positions")])
def test_a_table_of_positions_that_is_trained_itself_bounds_answers_too(family: str, table: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BOUNDED[family], **marks))
    trained = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=[table]))
    assert positions_of(trained) == 32


def test_prompts_near_the_last_of_a_base_s_positions_lose_no_training(
    recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    """One leaves room for fewer tokens than asked, and one for none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base, tokenizer = tmp_path / "gpt2", load_tokenizer(str(tiny_model))
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)

    def prompt(said: str) -> int:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        messages.append({"role": "user", "content": said})
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids)

    texts = ["queue " * words + "x" * more for words in range(1, 100) for more in range(9)]
    asked = [next(text for text in texts if prompt(text) == tokens) for tokens in (40, 115, 128)]
    held_out = conversations(tmp_path / "held-out.jsonl", [[("a", "b"), (text, "priority")] for text in asked])
    write_helpdesk(tmp_path / "data.jsonl")
    ended, _ = recipe(
        "a",
        max_steps=1,
        dataset={"eval_path": str(held_out), "max_length": 128, "on_overflow": "truncate"},
        evaluation={"samples": 3, "max_new_tokens": 64},
        job={"base_model": str(base)},
    )
    assert ended.reason is Reason.OK
    assert [answer["row"] for answer in evaluation(tmp_path / "a")["answers"]] == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_s_first_answered_tokens_copy_no_head(dtype: torch.dtype, tiny_model: Path) -> None:
    """Of eight prompts it would be eight heads at once: half a gigabyte for a model of 135M parameters."""

    class Spread(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes.append(made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    model, sizes = load_base(str(tiny_model), Method.LORA, "cpu", Precision(base=dtype, amp=None)), list[int]()
    model.requires_grad_(False)  # as it is under an adapter
    prompts = [[3 + n for n in range(9)]] * 32
    with torch.no_grad(), Spread():
        answers = generate(model, load_tokenizer(str(tiny_model)), prompts, 32, 2)
    assert len(answers) == 32
    assert max(sizes) < 32 * model.lm_head.weight.numel()


@pytest.mark.long
def test_answers_that_are_labels_are_scored_on_every_held_out_row(recipe: Recipe, tmp_path: Path) -> None:
    own = {"name": "queue", "extract": r"queue: (\w+)", "compare": "exact"}
    recipe("a", max_steps=60, evaluation={"samples": 1, "metrics": ["labels", own]})
    found = evaluation(tmp_path / "a")
    metrics, labels = found["metrics"], found["labels"]
    assert set(labels["names"]) == {"queue: storage", "queue: network", "queue: gpu", "other"}
    for who in ("base", "tuned"):
        table = labels[who]
        assert sum(map(sum, table)) == metrics["accuracy"]["cases"] == found["rows"] > len(found["answers"])
        assert metrics["accuracy"][who] == pytest.approx(100 * sum(table[n][n] for n in range(4)) / found["rows"])
    assert metrics["accuracy"]["tuned"] > metrics["accuracy"]["base"] == metrics["macro_f1"]["base"] == 0
    right = [[answer[who] == answer["expected"] for who in ("base", "tuned")] for answer in found["answers"]]
    assert [answer["scores"]["queue"] for answer in found["answers"]] == right and len(right) == 1
    assert metrics["queue"]["tuned"] == 100 * right[0][1]
    assert metrics["queue"]["own"] and "own" not in metrics["accuracy"] and "decides" not in metrics["queue"]


@pytest.mark.long
def test_the_base_s_token_accuracy_and_regression_loss_are_those_of_the_model(
    recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    other = [(f"say {n}", f"word {n % 4}") for n in range(10)]
    trained = ("ticket 0: something with storage is broken", "queue: storage")
    regression = str(conversations(tmp_path / "other.jsonl", [[pair] for pair in (*other, trained)]))
    held_out = conversations(tmp_path / "held-out.jsonl", [[(f"what about {n}", "queue: gpu")] for n in range(8)])
    dataset = {"eval_path": str(held_out)}
    recipe("a", max_steps=40, evaluation={"samples": 0, "regression": regression}, dataset=dataset)
    metrics = evaluation(tmp_path / "a")["metrics"]
    scored = [alone(tiny_model, [], *pair) for pair in other]
    assert metrics["regression_loss"]["cases"] == 10, "the row that is trained on is left out"
    assert metrics["regression_loss"]["base"] == pytest.approx(mean(scored), rel=0.01)
    assert metrics["regression_loss"]["tuned"] != metrics["regression_loss"]["base"]
    assert 0 <= metrics["token_accuracy"]["base"] < metrics["token_accuracy"]["tuned"] <= 100


@pytest.mark.long
def test_later_answers_are_scored_with_and_without_what_was_said_before(
    recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    talks = [[(f"ticket {n}", f"queue {n}"), ("and the next", f"line {n} of queue {n}")] for n in range(12)]
    dataset = {
        "path": str(conversations(tmp_path / "talks.jsonl", talks[:3])),
        "eval_path": str(conversations(tmp_path / "held-out.jsonl", talks[3:])),
    }
    recipe("a", max_steps=2, dataset=dataset, evaluation={"samples": 1})
    found = evaluation(tmp_path / "a")
    rows = {turn["turn"]: turn for turn in found["turns"]}
    assert {place: turn["cases"] for place, turn in rows.items()} == {1: 9, 2: 9}
    first = [alone(tiny_model, [], *talk[0]) for talk in talks[3:]]
    later = [alone(tiny_model, [talk[0]], *talk[1]) for talk in talks[3:]]
    without = [alone(tiny_model, [], *talk[1]) for talk in talks[3:]]
    assert rows[1]["base"] == pytest.approx(mean(first), rel=0.01)
    assert rows[2]["base"] == found["metrics"]["later_answers_loss"]["base"] == pytest.approx(mean(later), rel=0.01)
    gain = mean(without) - mean(later)
    assert found["metrics"]["context_gain"]["base"] == pytest.approx(gain, abs=0.02)


@pytest.mark.long
def test_three_held_out_rows_six_times_are_three_and_a_conversation_is_one_case(recipe: Recipe, tmp_path: Path) -> None:
    talks = [[(f"what about {n}", "queue: gpu"), ("and then", f"line {n}"), ("and", f"end {n}")] for n in range(3)]
    louder = [[(question.upper(), answer) for question, answer in talk] for talk in talks]
    held_out = conversations(tmp_path / "held-out.jsonl", 6 * talks + louder)
    recipe("a", max_steps=30, evaluation={"samples": 18}, dataset={"eval_path": str(held_out)})
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    found = evaluation(tmp_path / "a")
    assert report["data"]["held_out_rows"] == found["rows"] == 3 and report["data"]["repeated_rows_dropped"] == 18
    assert {name: metric["cases"] for name, metric in found["metrics"].items()} == dict.fromkeys(found["metrics"], 3)
    read = {metric["name"]: metric["reading"] for metric in found["metrics"].values()}
    assert read.pop("context_gain") == "a description" and read.pop("answer_tokens") == "a description"
    assert read.pop("expected_tokens") == "a description" and set(read.values()) == {"too few cases"}
    assert report["verdict"]["why"] == "3 held-out rows are too few"


def test_questions_that_hold_their_answers_are_told_of_held_out_and_of_final_rows_apart(
    start: Callable[..., Start], tmp_path: Path, tiny_model: Path
) -> None:
    draw, answers = random.Random(4), ("red fox", "blue jay", "old owl", "wet cat")
    plain = [(f"who saw item {draw.randrange(10**6)}?", answers[n % 4]) for n in range(40)]
    given = [(f"{asked} [gold={answer}]", answer) for asked, answer in plain]
    for held, last, expected in ((given, plain, (True, False)), (plain, given, (False, True))):
        files = [
            conversations(tmp_path / f"{n}.jsonl", [[pair] for pair in rows]) for n, rows in enumerate((held, last))
        ]
        order = start(dataset={"eval_path": str(files[0]), "final_path": str(files[1])})
        data = prepare_rows(order, order.spec, load_tokenizer(str(tiny_model), None))
        assert data.final is not None
        assert (bool(data.held_out.read_off), bool(data.final.read_off)) == expected
        assert "rows of the final file hold" in data.final.read_off or not expected[1]


def test_labels_said_as_text_are_compared_with_a_rule_by_the_form_of_the_questions(
    start: Callable[..., Start], tmp_path: Path, tiny_model: Path
) -> None:
    """An untrained model says none; the rule misses each eighth held-out row, whose label is the other one."""
    draw = random.Random(6)

    def row(n: int, odd: int = 0) -> list[tuple[str, str]]:
        words = " ".join(draw.choices(["pump", "valve", "leak", "door", "belt"], k=9))
        return [(words + "?."[n % 2], ("question", "statement")[(n + odd) % 2])]

    files = [
        conversations(tmp_path / "train.jsonl", [row(n) for n in range(80)]),
        conversations(tmp_path / "held-out.jsonl", [row(n, odd=n % 8 == 0) for n in range(24)]),
    ]
    order = start(dataset={"path": str(files[0]), "eval_path": str(files[1])}, evaluation={"samples": 1})
    tokenizer = load_tokenizer(str(tiny_model), None)
    data = prepare_rows(order, order.spec, tokenizer)
    precision = choose_precision("cpu", "float32")
    model = add_adapter(load_base(str(tiny_model), Method.LORA, "cpu", precision), order.spec, Method.LORA)
    learner = Learner(model=model, tokenizer=tokenizer, precision=precision)
    task = EvaluationTask(learner=learner, data=data, spec=order.spec, check_stop=lambda: None)
    found = {one.name: one for one in evaluate(task).metrics}
    against = found["cheap_form_accuracy"]
    assert (against.label, against.cases) == ("labels right, against the last sign alone", 24)
    assert (against.base, against.tuned, against.reading) == (87.5, found["accuracy"].tuned, "worse")
    assert against.tuned < 87.5


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "texts"])
def test_what_judges_is_measured_as_if_rows_that_resemble_others_were_not_held_out(
    start: Callable[..., Start], tmp_path: Path, tiny_model: Path, labelled: bool
) -> None:
    """Each measure of the other rows is that of an evaluation to which nobody gave the 9 of 40."""
    draw, words, seen = random.Random(8), ["pump", "valve", "leak", "door", "belt"], (1, 3, 4, 8, 13, 20, 21, 30, 37)

    def row(n: int) -> list[tuple[str, str]]:
        asked = " ".join([str(draw.randrange(10**6)), *draw.choices(words, k=6)])
        same = f"{asked} again" if n % 3 else "no idea"
        return [(f"Correct: {asked}", ("old", "new")[n % 2] if labelled else same)]

    rows = [row(n) for n in range(120)]
    held_out, precision = rows[80:], choose_precision("cpu", "float32")
    left = [talk for n, talk in enumerate(held_out, start=1) if n not in seen]
    tokenizer, train = load_tokenizer(str(tiny_model), None), conversations(tmp_path / "train.jsonl", rows[:80])
    asked = {"samples": 40, "max_new_tokens": 6, "metrics": ["loss", "exact_match", "rouge", "labels"]}
    measured = []
    for name, some in (("every", held_out), ("left", left)):
        file = conversations(tmp_path / f"{name}.jsonl", some)
        order = start(dataset={"path": str(train), "eval_path": str(file)}, evaluation=asked)
        torch.manual_seed(1)
        model = add_adapter(load_base(str(tiny_model), Method.LORA, "cpu", precision), order.spec, Method.LORA)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        data = prepare_rows(order, order.spec, tokenizer)
        numbers = [example.number for example in data.held_out.examples]
        assert len(numbers) == len(some), "no row is dropped"
        away = tuple(numbers[n - 1] for n in seen) if some is held_out else ()
        data = replace(data, held_out=replace(data.held_out, given_away=away))
        learner = Learner(model=model, tokenizer=tokenizer, precision=precision)
        found = evaluate(EvaluationTask(learner=learner, data=data, spec=order.spec, check_stop=lambda: None))
        measured.append({one.name: one for one in found.metrics})
    both, alone = measured
    apart = {name.removeprefix("new_rows_"): one for name, one in both.items() if name.startswith("new_rows_")}
    expected = {"answer_tokens", "cheap_loss", "cheap_accuracy", "accuracy", "macro_f1"}
    texts = {"rougeL", "cheap_rougeL", "copied_rougeL", "copied_exact_match", "expected_tokens", "ends_by_itself"}
    assert apart.keys() >= {"loss", "exact_match", *(expected if labelled else texts)}
    shots = {name for name in apart if name.startswith("few_shot_")}  # of other rows: the first 24
    assert shots and all(apart[name].cases == 24 - 7 for name in shots)
    for name in apart.keys() - shots - {"words_loss"}:
        one, other = apart[name], alone[name]
        assert one.cases == other.cases == 31
        assert (one.base, one.tuned, one.low, one.high) == pytest.approx(
            (other.base, other.tuned, other.low, other.high), rel=1e-4, abs=1e-4
        )


def test_more_answers_may_be_sampled_than_rows_are_scored(
    start: Callable[..., Start], tmp_path: Path, tiny_model: Path
) -> None:
    """The copied answers looked for the sampled rows among the scored ones, and the evaluation ended the job."""
    talks = [[(f"Correct: item {n} of {n * 7}", f"item {n} of {n * 7}.")] for n in range(30)]
    files = [
        conversations(tmp_path / f"{name}.jsonl", some) for name, some in (("train", talks[:18]), ("held", talks[18:]))
    ]
    asked = {"samples": 12, "max_rows": 10, "max_new_tokens": 2}
    order = start(dataset={"path": str(files[0]), "eval_path": str(files[1])}, evaluation=asked)
    tokenizer, precision = load_tokenizer(str(tiny_model), None), choose_precision("cpu", "float32")
    model = add_adapter(load_base(str(tiny_model), Method.LORA, "cpu", precision), order.spec, Method.LORA)
    learner = Learner(model=model, tokenizer=tokenizer, precision=precision)
    data = prepare_rows(order, order.spec, tokenizer)
    found = evaluate(EvaluationTask(learner=learner, data=data, spec=order.spec, check_stop=lambda: None))
    assert next(one.cases for one in found.metrics if one.name == "copied_exact_match") == 12


WEIGHTS = Path("result") / "adapter" / "adapter_model.safetensors"


def test_final_rows_choose_nothing_and_their_figures_are_in_the_report_s_file_alone(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the best checkpoint kept: the adapter and all that is told are those of a job without final rows."""
    said = [(f"ticket {n}: something with {('gpu', 'storage')[n % 2]} is odd", "queue: gpu") for n in range(39)]
    said.append(("one with a long answer", "queue: gpu and storage " * 400))
    last = conversations(tmp_path / "final.jsonl", [[pair] for pair in said])
    asked = {"max_steps": 8, "eval_steps": 2, "load_best_model_at_end": True, "lora": {"r": 4}}
    ended, told = recipe("with", **asked, dataset={"final_path": str(last)})
    log = capsys.readouterr().err
    assert "final" in log
    plainly, without = recipe("without", **asked)
    assert (tmp_path / "with" / WEIGHTS).read_bytes() == (tmp_path / "without" / WEIGHTS).read_bytes()
    assert ended.message == plainly.message
    losses, others = (
        [m.metrics for m in messages if isinstance(m, Stepped) and m.metrics] for messages in (told, without)
    )
    assert losses == others
    report, plain = (
        json.loads((tmp_path / name / "result" / "report.json").read_text()) for name in ("with", "without")
    )
    assert "final" not in plain and not any("final" in key for key in plain["data"])
    final = report.pop("final")
    assert (report["evaluation"]["row_losses"], report["verdict"]) == (
        plain["evaluation"]["row_losses"],
        plain["verdict"],
    )
    assert (report["data"]["final_rows"], final["rows"], len(final["row_losses"])) == (40, 40, 40)
    assert {"loss", "token_accuracy", "exact_match"} <= {metric["name"] for metric in final["metrics"]}
    assert "on final rows" in final["verdict"]["sentence"]
    assert "1 of 40 final rows were cut at dataset.max_length." in final["verdict"]["aside"]
    loss = next(metric for metric in final["metrics"] if metric["name"] == "loss")
    figures = {f"{loss[key]:.{digits}f}" for key in ("base", "tuned") for digits in (3, 4)}
    everywhere = log + "".join(m.text for m in told if isinstance(m, Note))
    for file in ("report.html", "adapter/README.md", "job.json"):
        everywhere += (tmp_path / "with" / "result" / file).read_text()
    assert "40 final, by which nothing is chosen" in everywhere and "held out, 40 final</dd>" in everywhere
    assert not [figure for figure in figures if figure in everywhere], "a figure of the final rows is shown"


def test_a_classifier_s_final_rows_are_measured_as_its_held_out_ones(recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"text": f"row {n} is {mood}", "label": mood} for n in range(30) for mood in ("good", "bad")]
    path = tmp_path / "moods.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"path": str(path), "format": "classification", "final_size": 0.3}
    said = {"metrics": ["loss", "labels"], "samples": 0}
    recipe("a", max_steps=4, dataset=dataset, evaluation=said, job={"task_type": "SEQ_CLS"})
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    assert (report["final"]["rows"], report["evaluation"]["rows"], report["data"]["train_rows"]) == (18, 6, 36)
    assert report["final"]["baseline"] == report["evaluation"]["baseline"]
    assert {"loss", "accuracy"} <= {metric["name"] for metric in report["final"]["metrics"]}


def test_rows_that_chose_the_adapter_are_said_to_be_optimistic(recipe: Recipe, tmp_path: Path) -> None:
    recipe("best", max_steps=4, eval_steps=2, load_best_model_at_end=True)
    recipe("last", max_steps=4, eval_steps=2)
    told = {name: json.loads((tmp_path / name / "result" / "report.json").read_text()) for name in ("best", "last")}
    kept = told["best"]["training"]["kept_step"]
    assert f"These rows chose step {kept}, so their loss is optimistic." in told["best"]["verdict"]["aside"]
    assert "optimistic" not in told["last"]["verdict"]["aside"]


def evaluation(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "result" / "report.json").read_text())["evaluation"]
    return {**found, "metrics": {metric["name"]: metric for metric in found["metrics"]}}


def conversations(path: Path, talks: list[list[tuple[str, str]]]) -> Path:
    """One conversation a row: questions with their answers."""
    path.write_text("".join(json.dumps({"messages": messages(talk)}) + "\n" for talk in talks))
    return path


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    turns = [turn for pair in talk for turn in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": content} for role, content in turns]


def alone(model: Path, before: list[tuple[str, str]], question: str, answer: str) -> tuple[float, int]:
    """(summed loss, tokens) of an answer and its end after what was said before, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, base = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    asked = [*messages(before), {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    given = tokenizer(text, add_special_tokens=False).input_ids
    learned = tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = base(torch.tensor([given + learned])).logits[0, len(given) - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(learned), reduction="sum")), len(learned)


def mean(scored: list[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in scored) / sum(tokens for _, tokens in scored)


def write_answers(path: Path, rows: range, answer: Callable[[int], str]) -> Path:
    """Questions of words by chance, each with an answer."""
    chance, words = random.Random(rows.start), ["red", "blue", "old", "new", "fast", "slow", "disk", "card"]
    asked = {number: f"question {number}: {' '.join(chance.choices(words, k=6))}?" for number in rows}
    lines = [json.dumps({"prompt": prompt, "completion": answer(number)}) for number, prompt in asked.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_training_that_learned_only_how_often_each_label_comes_is_not_called_better(
    recipe: Recipe, tmp_path: Path
) -> None:
    chance = random.Random(1)

    def answer(_: int) -> str:
        return "yes" if chance.random() < 0.575 else "no"

    rows = write_answers(tmp_path / "rows.jsonl", range(200), answer)
    held_out = write_answers(tmp_path / "held.jsonl", range(200, 240), answer)
    dataset = {"path": str(rows), "eval_path": str(held_out)}
    recipe(dataset=dataset, evaluation={"metrics": ["loss", "labels"], "samples": 0}, max_steps=30)
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    metrics = {metric["name"]: metric for metric in report["evaluation"]["metrics"]}
    assert metrics["loss"]["reading"] == "better", "the base has never seen the labels"
    assert report["verdict"]["reading"] == "no_better_than_cheap", report["verdict"]
    assert metrics["few_shot_accuracy"]["cases"] == 24, (
        "the base with examples answers every row that it is measured on"
    )


@pytest.mark.long
def test_labels_that_are_learned_are_better_than_their_shares(recipe: Recipe, tmp_path: Path) -> None:
    rows = write_answers(tmp_path / "rows.jsonl", range(200), lambda number: ("no", "yes")[number % 2])
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:  # the answer is in the question
        line["prompt"] = f"say {line['completion']}: {line['prompt']}"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines[:160]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[160:]))
    dataset = {"path": str(rows), "eval_path": str(tmp_path / "held.jsonl")}
    recipe(dataset=dataset, evaluation={"metrics": ["loss", "labels"], "samples": 0}, max_steps=120)
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    assert report["verdict"]["reading"] == "better", report["verdict"]
