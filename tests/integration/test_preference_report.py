"""Pairs on held-out rows: losses, margins and answers of base and tuned against sums by hand, and what reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.model_card import Published, hub_card, lab_card
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.report.text import report_text
from loractl.scheduler.web.pages.shelf import digest
from loractl.worker.base.arithmetic import choose_precision, evaluating
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Learner, load_base, load_tokenizer
from loractl.worker.data.prepared import PreparedData, prepare_data
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.evaluation.evaluation import Evaluation, EvaluationTask
from loractl.worker.evaluation.preferences import evaluate_preferences, repetition
from loractl.worker.evaluation.report import _evaluation, render_html, verdict
from loractl.worker.recipe.kinds import trained_kind

from ..acceptance.test_report_page import report

FP32 = choose_precision("cpu", "float32")
SCREEN = Screen(width=140, unicode=True, color=False)

Made = Callable[..., tuple[Learner, PreparedData, JobSpec]]


def pair(n: int, part: str) -> dict[str, Any]:
    """A question with a long and a short answer, either of which may be chosen."""
    said = [f"queue {n} of the network", f"please answer the next line of the storage queue {n}"]
    asked = [{"role": "user", "content": f"{part} line {n}?"}]
    return {"prompt": asked, "chosen": said[n % 3 > 0], "rejected": said[n % 3 == 0]}


def elsewhere(row: dict[str, Any], key: str) -> dict[str, Any]:
    """A row with another prompt, but among those held out."""
    prompt = row["prompt"]
    said = f"{key} {prompt}" if isinstance(prompt, str) else [{"role": "system", "content": key}, *prompt]
    return row if key == "eval_path" else {**row, "prompt": said}


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path) -> Made:
    """A tiny model with a random adapter, 3 pairs to train on, 10 held out and 9 final."""
    rows_of = {"path": 3, "eval_path": 10, "final_path": 9}

    def make(lean: bool = False, rows: list[dict[str, Any]] | None = None, **preference: Any) -> tuple[Any, Any, Any]:
        paths = {key: tmp_path / f"{key}.jsonl" for key in rows_of}
        for key, path in paths.items():
            some = (
                [pair(n, key) for n in range(rows_of[key])] if rows is None else [elsewhere(row, key) for row in rows]
            )
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
        files = {key: str(path) for key, path in paths.items()}
        spec = JobSpec.model_validate(
            {
                "name": "pairs", "base_model": str(tiny_model), "method": "lora", "task_type": "preference",
                "dataset": {**files, "max_length": 64}, "preference": preference,
                "evaluation": {
                    "metrics": ["loss", "preferences"], "samples": 3, "max_new_tokens": 6,
                    "per_device_eval_batch_size": 4,
                },
            }
        )  # fmt: skip
        tokenizer = load_tokenizer(str(tiny_model))
        model = add_adapter(load_base(str(tiny_model), Method.LORA, "cpu", FP32), spec, Method.LORA)
        torch.manual_seed(1)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights.data, std=0.3)
        learner = Learner(model=model, tokenizer=tokenizer, precision=FP32)
        if lean:
            learner = replace(learner, scorer=LeanPass(model, FP32))
        held, last = files["eval_path"], files["final_path"]
        data = prepare_data(spec.dataset, files["path"], held, None, tokenizer, None, final_path=last)
        return learner, data, spec

    return make


def evaluated(learner: Learner, data: PreparedData, spec: JobSpec, **how: Any) -> tuple[Evaluation, dict[str, Any]]:
    found = evaluate_preferences(EvaluationTask(learner=learner, data=data, spec=spec, check_stop=lambda: None, **how))
    return found, {metric.name: metric for metric in found.metrics}


class ByHand:
    """Log-probabilities of answers behind their prompts, by transformers and peft alone."""

    def __init__(self, learner: Learner, row: dict[str, Any], *, base: bool) -> None:
        self.tokenizer, self.model, self.base = learner.tokenizer, learner.model, base
        self.prompt = row["prompt"]
        if not isinstance(self.prompt, str):
            self.prompt = self.tokenizer.apply_chat_template(self.prompt, add_generation_prompt=True, tokenize=False)
        self.chosen, self.chosen_tokens = self.answer(row["chosen"])
        self.rejected, self.rejected_tokens = self.answer(row["rejected"])
        self.margin = self.chosen - self.rejected

    def answer(self, text: str) -> tuple[float, int]:
        given, said = (self.tokenizer(part, add_special_tokens=False).input_ids for part in (self.prompt, text))
        return self.sum_of([*given, *said, self.tokenizer.eos_token_id], len(given))

    def sum_of(self, ids: list[int], given: int) -> tuple[float, int]:
        with evaluating(self.model, base=self.base):
            logits = self.model(torch.tensor([ids])).logits[0, given - 1 : -1].double()
        expected = torch.tensor(ids[given:])
        return -float(cross_entropy(logits, expected, reduction="sum")), len(expected)


def both(learner: Learner, rows: list[dict[str, str]]) -> tuple[list[ByHand], list[ByHand]]:
    base, tuned = ([ByHand(learner, row, base=off) for row in rows] for off in (True, False))
    return base, tuned


def softplus(x: float) -> float:
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize("lean", [False, True], ids=["padded", "lean"])
def test_loss_share_and_margins_are_those_by_hand(made: Made, lean: bool) -> None:
    learner, data, spec = made(lean, beta=0.2)
    found, metrics = evaluated(learner, data, spec)
    base, tuned = both(learner, [pair(n, "eval_path") for n in range(10)])
    losses = [softplus(0.2 * (after.margin - before.margin)) for before, after in zip(base, tuned, strict=True)]
    assert metrics["loss"].base == pytest.approx(math.log(2))
    assert metrics["loss"].tuned == pytest.approx(np.mean(losses), rel=1e-4)
    assert (metrics["loss"].label, metrics["loss"].cases) == ("preference loss", 10)
    for who, sums in (("base", base), ("tuned", tuned)):
        right = 100 * np.mean([one.margin > 0 for one in sums])
        assert getattr(metrics["preference_accuracy"], who) == pytest.approx(right)
        assert getattr(metrics["preference_margin"], who) == pytest.approx(
            np.mean([one.margin for one in sums]), rel=1e-4
        )
        tokens = sum(one.chosen_tokens for one in sums)
        assert getattr(metrics["chosen_loss"], who) == pytest.approx(-sum(o.chosen for o in sums) / tokens, rel=1e-4)
    assert 0 < metrics["preference_accuracy"].base < 100
    rows = [
        (number, 1, round(math.log(2), 6), pytest.approx(loss, rel=1e-4), one.chosen_tokens + one.rejected_tokens)
        for number, loss, one in zip(range(1, 11), losses, base, strict=True)
    ]
    assert found.rows == 10 and found.row_losses == rows


@pytest.mark.long
def test_losses_a_token_have_margins_a_token_and_a_term_for_answers_is_each_pair_s_own_mean(made: Made) -> None:
    learner, data, spec = made(loss_type=["ipo", "sft"], loss_weights=[1, 0.5], beta=0.5)
    _, metrics = evaluated(learner, data, spec)
    base, tuned = both(learner, [pair(n, "eval_path") for n in range(10)])

    def mean_margin(one: ByHand) -> float:
        return one.chosen / one.chosen_tokens - one.rejected / one.rejected_tokens

    losses = [
        (mean_margin(after) - mean_margin(before) - 1) ** 2 - 0.5 * after.chosen / after.chosen_tokens
        for before, after in zip(base, tuned, strict=True)
    ]
    assert metrics["loss"].tuned == pytest.approx(np.mean(losses), rel=1e-4)
    # a mean near zero: its digits are those of the losses that it is a difference of
    assert metrics["preference_margin"].tuned == pytest.approx(np.mean([mean_margin(one) for one in tuned]), abs=1e-6)


@pytest.mark.parametrize("lean", [False, True], ids=["padded", "lean"])
def test_orpo_learns_the_prompt_with_the_chosen_answer_even_one_of_a_token(made: Made, lean: bool) -> None:
    rows = [{"prompt": "p" * (1 + n), "chosen": f":queue{n}", "rejected": f":answer,line{n}"} for n in range(9)]
    learner, data, spec = made(lean, rows, loss_type="orpo", beta=0.3)
    _, metrics = evaluated(learner, data, spec)
    losses = []
    for row in rows:
        one = ByHand(learner, row, base=False)
        means = one.chosen / one.chosen_tokens, one.rejected / one.rejected_tokens
        odds = [mean - math.log1p(-math.exp(mean)) for mean in means]
        asked = learner.tokenizer(row["prompt"]).input_ids
        given, tokens = one.sum_of(asked, 1) if len(asked) > 1 else (0.0, 0)
        losses.append(0.3 * softplus(odds[0] - odds[1]) - (one.chosen + given) / (one.chosen_tokens + tokens))
    assert metrics["loss"].tuned == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.long
def test_a_job_that_started_from_an_adapter_is_compared_with_that_one(made: Made) -> None:
    """Shuffled pairs would look better else: the bare base is far from any adapter, so its own loss is high."""
    learner, data, spec = made()
    started = [parameter.detach().clone() for parameter in learner.model.parameters() if parameter.requires_grad]
    found, same = evaluated(replace(learner, started=started), data, spec)
    assert (found.baseline, found.against) == ("the starting adapter", "the starting adapter")
    assert same["loss"].base == same["loss"].tuned == pytest.approx(np.log(2), rel=1e-6)
    assert same["preference_margin"].change == 0 == same["chosen_loss"].change
    _, plain = evaluated(learner, data, spec)
    assert same["preference_margin"].tuned == plain["preference_margin"].tuned != plain["preference_margin"].base
    with torch.no_grad():
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    _, moved = evaluated(replace(learner, started=started), data, spec)
    assert moved["preference_margin"].base == plain["preference_margin"].tuned != moved["preference_margin"].tuned


def _noted(told: list[tuple[int, int]], *at: int) -> None:
    told.append((at[0], at[1]))


@pytest.mark.long
def test_the_work_that_is_told_adds_up(made: Made) -> None:
    learner, data, spec = made()
    kind, told = trained_kind(spec), list[tuple[int, int]]()
    stretches = kind.stretches(spec, data, learner.tokenizer)
    task = EvaluationTask(
        learner=learner, data=data, spec=spec, check_stop=lambda: None, progress=partial(_noted, told)
    )
    found, total = kind.evaluate(task), 2 * (20 + 3)
    assert {of for _, of in told} == {total} == {sum(stretch.count for stretch in stretches)}
    assert told[-1][0] == total and [done for done, _ in told] == sorted(done for done, _ in told)
    assert kind.answers(spec, data) == 3 == len(found.answers)


@pytest.mark.long
def test_a_batch_is_tried_as_the_evaluation_has_it_at_its_longest(made: Made) -> None:
    learner, data, spec = made()
    rows, seen = data.held_out.rows.first(4), list[torch.Size]()
    with (
        evaluating(learner.model),
        learner.model.get_input_embeddings().register_forward_hook(lambda *told: seen.append(told[2].shape)),
    ):
        trained_kind(spec).score(learner, rows)
    longest = max(max(row.starts[0], len(row.input_ids) - row.starts[0]) for row in rows)
    assert [tuple(shape[:2]) for shape in seen] == [(4, longest)]


@pytest.mark.long
def test_final_pairs_are_measured_as_the_held_out_ones(made: Made) -> None:
    learner, data, spec = made()
    final = data.of_final
    assert final is not None
    found, metrics = evaluated(learner, final, spec)
    base, tuned = both(learner, [pair(n, "final_path") for n in range(9)])
    losses = [softplus(0.1 * (after.margin - before.margin)) for before, after in zip(base, tuned, strict=True)]
    assert found.rows == 9 and metrics["loss"].tuned == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.long
def test_pairs_that_are_given_away_are_measured_apart(made: Made) -> None:
    learner, data, spec = made()
    _, metrics = evaluated(learner, replace(data, held_out=replace(data.held_out, given_away=(2, 5))), spec)
    assert (metrics["new_rows_loss"].cases, metrics["new_rows_preference_accuracy"].cases) == (8, 8)
    spec = spec.model_copy(
        update={"evaluation": spec.evaluation.model_copy(update={"metrics": ["loss"], "samples": 0})}
    )
    _, metrics = evaluated(learner, data, spec)
    assert set(metrics) == {"loss", "chosen_loss"}, "what nobody asks for is not told"


@pytest.mark.long
def test_the_answer_of_a_talk_that_goes_on_is_asked_for_where_both_begin(made: Made) -> None:
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]
    rows = [
        {
            "prompt": [*talk[:2], {"role": "user", "content": f"two {n}"}],
            "chosen": [
                {"role": "assistant", "content": f"better {n}"},
                *talk[:1],
                {"role": "assistant", "content": "on"},
            ],
            "rejected": [{"role": "assistant", "content": f"worse {n}"}],
        }
        for n in range(3)
    ]
    learner, data, spec = made(rows=rows)
    found, _ = evaluated(learner, data, spec)
    assert [(a.expected, a.rejected) for a in found.answers] == [(f"better {n}", f"worse {n}") for n in range(3)]
    assert found.answers[0].prompt.endswith("user: two 0")


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("a b c", 0), ("a b c d e", 0), ("a b c d a b c d", 20), ("no no no no no no", 100 * 2 / 3)],
)
def test_a_run_of_four_words_repeats_where_it_stood_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_everyone_who_reads_a_report_shows_one_of_pairs(made: Made) -> None:
    learner, data, spec = made()
    found, _ = evaluated(learner, data, spec)
    value = {**report(verdict=verdict(found.metrics)), "task_type": "preference"}
    value["evaluation"] = json.loads(json.dumps(_evaluation(found)))
    page, text = render_html(value), report_text(value, SCREEN, 2)
    answer = value["evaluation"]["answers"][0]
    assert "nats per pair, over the steps" in page and "wrong</span>" not in page and 'type="radio"' in page
    for title, said in (("Chosen", answer["expected"]), ("Rejected", answer["rejected"])):
        assert f"<h3><span>{title}</span></h3><pre>{said}</pre>" in page
        assert f"  {title.lower()}: {said}\n" in text
    assert "preference accuracy, %" in text and "preference accuracy" in page
    assert "(right)" not in text and "(wrong)" not in text and "1 more answer" in text
    shown = digest(value)
    assert [(group.key, len(group.answers)) for group in shown.groups] == [("all", 3)]
    assert shown.main.label == "preference loss" and shown.groups[0].answers[0]["rejected"] == answer["rejected"]
    value["data"] |= {"more_sha256": [], "sources": []}
    assert "held-out preference loss on 10 rows: base 0.6931, tuned " in lab_card(value)
    card = hub_card(value, spec, Published(repository="a/b", base="a/c", license=None, datasets=(), final=""))
    assert "| preference accuracy, % |" in card and "| loss_type | sigmoid |" in card and "\n- dpo\n" in card
    assert "pipeline_tag: text-generation" in card and answer["expected"] not in card
