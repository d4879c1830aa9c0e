"""One verdict: every face of a report and of a comparison says the same of the same numbers."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import numpy as np
import pytest

from loractl.common.data.examples import Example
from loractl.common.verdict import BADGES, MeasuredChange, decimals, noticeable, written
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.report.text import report_text
from loractl.worker.evaluation.cheap import cheap_metrics
from loractl.worker.evaluation.comparison import Compared, Labels, label_metrics, with_new_rows
from loractl.worker.evaluation.dialogue import CONTEXT_GAIN
from loractl.worker.evaluation.report import render_html, verdict
from loractl.worker.evaluation.row_losses import RowScores, loss_metrics

from ..acceptance.test_report_page import report

SCREEN = Screen(width=140, unicode=True, color=False)


def loss(base: float, tuned: float, spread: float, cases: int = 40) -> Compared:
    change = tuned - base
    return Compared(
        name="loss", label="loss", unit="nats", higher_is_better=False, cases=cases, base=base, tuned=tuned,
        change=change, low=change - spread, high=change + spread,
    )  # fmt: skip


FACES = [
    # measured, the verdict's reading, the metric's, the words that every face has, those that none may have
    (loss(3.5, 1.25, 0.3), "better", "better", "Better", ("Worse", "can't", "No ", "by loss only")),
    (loss(3.5, 1.25, 0.3), "better_by_loss", "better", "Better by loss only", ("Worse", "can't", "No clear")),
    (loss(1.25, 3.5, 0.3), "worse", "worse", "Worse", ("Better", "can't", "No ")),
    (loss(3.5, 3.4, 0.3), "no_clear_change", "no clear change", "No clear change", ("Better", "Worse", "can't")),
    (
        loss(3.5, 1.25, 0.1, cases=3), "cant_be_judged", "too few cases", "Can't be judged",
        ("Better", "Worse", "No clear"),
    ),
    (
        loss(16.5512, 16.5491, 0.0004), "no_clear_change", "no practical change", "No clear change",
        ("Better", "Worse", "can't", "includes zero"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "reading", "of_metric", "words", "others"), FACES, ids=[f"{face[1]}, {face[2]}" for face in FACES]
)
def test_text_badge_page_status_and_json_say_the_same(
    metric: Compared, reading: str, of_metric: str, words: str, others: tuple[str, ...]
) -> None:
    said = verdict([metric], texts=reading != "better_by_loss")
    assert (said["reading"], metric.reading, metric.as_json()["reading"]) == (reading, of_metric, of_metric)
    value = report(verdict=said)
    value["evaluation"] |= {"metrics": [metric.as_json()], "lm_eval": None, "turns": []}
    page, text = html.unescape(render_html(value)), report_text({**value, "verdict": said}, SCREEN, 0)
    badge = re.search(r'<span class="pill[^"]*" id="badge">([^<]*)</span>', page)
    headline = re.search(r'id="verdict">([^<]*)</p>', page)
    pill = re.search(r'<span class="pill[^"]*">. ([^<]*)</span></td>', page)
    assert badge and headline and pill
    assert badge[1] == BADGES[reading] and pill[1] == of_metric.capitalize()
    for face in (badge[1], headline[1], text.splitlines()[0], said["sentence"], said["short"]):
        assert words.lower() in face.lower(), face
        assert not [
            other for other in others if other.lower() in face.lower().replace("to say whether it is better", "")
        ]
    row = next(line for line in text.splitlines() if line.startswith("loss, nats"))
    assert row.endswith(of_metric)
    shown = written(metric.as_json())
    for number in (shown.base, shown.tuned):
        assert number in said["sentence"] and number in said["short"] and number in row and f">{number}<" in page
    assert f"{shown.interval}  " in row
    assert (f"<small>{shown.interval}</small>" in page) == (shown.interval != "–"), "a page has no lonely dash"


def test_a_change_that_nobody_would_notice_is_written_with_its_digits() -> None:
    said = verdict([loss(16.5512, 16.5491, 0.0004)])
    assert said["sentence"] == ("No clear change: too small to notice; held-out loss 16.5512 -> 16.5491.")
    shown = written(loss(16.5512, 16.5491, 0.0004).as_json())
    assert (shown.change, shown.interval) == ("−0.0021", "−0.0025 to −0.0017")
    few = written(loss(3.0, 2.0, 0.1, cases=7).as_json())
    assert (few.change, few.interval) == ("−1.00", "–"), "too few cases have no interval"


@pytest.mark.parametrize(
    ("change", "low", "high", "digits"),
    [
        (-0.17, -0.18, -0.16, 2), (-2.0, -3.0, -1.0, 2), (-0.0021, -0.0025, -0.0017, 4), (1e-4, 1e-4, 1e-4, 4),
        (0.001, -0.25, 0.25, 2), (0.0, 0.0, 0.0, 2), (None, None, None, 2), (math.nan, math.nan, math.nan, 2),
        (1e-12, 1e-12, 1e-12, 6),
    ],
)  # fmt: skip
def test_the_digits_follow_the_interval(
    change: float | None, low: float | None, high: float | None, digits: int
) -> None:
    assert decimals(change, low, high) == digits


@pytest.mark.parametrize(
    ("unit", "base", "least"), [("nats", 3.0, 0.01), ("%", 50.0, 0.1), ("", 0.5, 0.001), ("", 88.0, 0.88)]
)
def test_what_anyone_would_notice_depends_on_the_unit(unit: str, base: float, least: float) -> None:
    assert noticeable(unit, base) == pytest.approx(least)
    for factor, reading in ((0.9, "no practical change"), (1.1, "worse")):
        change = factor * least
        measured = MeasuredChange(base=base, change=change, low=change / 2, high=change * 2, cases=40, unit=unit)
        assert measured.reading == reading
    unclear = MeasuredChange(base=base, change=least / 9, low=-least / 9, high=least / 3, cases=40, unit=unit)
    assert unclear.reading == "no clear change", "zero is possible"


def test_a_description_is_neither_better_nor_worse_and_the_headline_is_about_the_verdict() -> None:
    worth = CONTEXT_GAIN.compared(40, 2.84, 1.2, -1.9, -1.4)
    forgotten = Compared(
        **{**vars(loss(2.0, 2.6, 0.1)), "name": "regression_loss", "label": "loss on the regression set"}
    )
    said = verdict([loss(3.5, 1.25, 0.3), worth, forgotten], texts=True)
    assert said["sentence"] == "Better than the base: held-out loss 3.50 -> 1.25."
    assert said["aside"] == "Worse on loss on the regression set."
    assert worth.reading == "a description" and worth.as_json()["higher_is_better"] is None
    value: dict[str, Any] = report(verdict=said)
    older = {**worth.as_json(), "higher_is_better": True, "reading": "worse"}
    for metric in (worth.as_json(), older):
        value["evaluation"] |= {"metrics": [loss(3.5, 1.25, 0.3).as_json(), metric], "lm_eval": None}
        page, text = render_html(value), report_text(value, SCREEN, 0)
        assert "neither way is better" in page and "– A description" in page
        assert '<p class="lede" id="aside">Worse on loss on the regression set.</p>' in page
        lines = text.splitlines()
        assert lines[0].endswith(said["sentence"]) and lines[1] == said["aside"]
        assert next(line for line in lines if "worth of earlier turns" in line).endswith("a description")


def rouge(base: float, tuned: float, spread: float, cases: int = 40) -> Compared:
    more = {"name": "rougeL", "label": "ROUGE-L", "unit": "%", "higher_is_better": True}
    return Compared(**{**vars(loss(base, tuned, spread, cases)), **more})


GAIN, LOSS = loss(3.46, 1.31, 0.3), loss(1.31, 3.46, 0.3)
FELL, FEW = rouge(35.3, 11.1, 5), rouge(35.3, 11.1, 5, cases=3)


@pytest.mark.parametrize(
    ("metrics", "reading", "sentence"),
    [
        (
            [GAIN, FELL], "cant_be_judged",
            "Can't be judged: better loss, worse answers; held-out loss 3.46 -> 1.31; ROUGE-L 35.3 -> 11.1.",
        ),
        (
            [LOSS, rouge(11.1, 35.3, 5)], "cant_be_judged",
            "Can't be judged: worse loss, better answers; held-out loss 1.31 -> 3.46; ROUGE-L 11.1 -> 35.3.",
        ),
        (
            [GAIN, FEW], "better_by_loss",
            "Better by loss only: 3 answers are too few to say; held-out loss 3.46 -> 1.31; ROUGE-L 35.3 -> 11.1.",
        ),
        (
            [GAIN, rouge(35.3, 36.1, 5)], "better_by_loss",
            "Better by loss only: no clear change of the answers; held-out loss 3.46 -> 1.31; ROUGE-L 35.3 -> 36.1.",
        ),
        (
            [GAIN, rouge(35.3, 61.1, 5, cases=3)], "better_by_loss",
            "Better by loss only: 3 answers are too few to say; held-out loss 3.46 -> 1.31.",
        ),
        ([GAIN, rouge(35.3, 61.1, 5)], "better", "Better than the base: held-out loss 3.46 -> 1.31."),
        ([LOSS, FELL], "worse", "Worse than the base: held-out loss 1.31 -> 3.46."),
    ],
    ids=["loss better", "loss worse", "few answers", "no clear change of answers", "few and better", "both better",
         "both worse"],
)  # fmt: skip
def test_where_loss_and_answers_disagree_the_first_sentence_says_so(
    metrics: list[Compared], reading: str, sentence: str
) -> None:
    said = verdict(metrics)
    assert (said["reading"], said["sentence"]) == (reading, sentence)
    assert said["aside"] == ("Worse on ROUGE-L." if reading == "worse" else ""), "it is said once"
    value: dict[str, Any] = report(verdict=said)
    value["evaluation"] |= {"metrics": [metric.as_json() for metric in metrics], "lm_eval": None}
    assert BADGES[reading] in html.unescape(render_html(value))


def test_what_is_known_of_the_held_out_rows_stands_beside_the_verdict() -> None:
    doubts = ["8 rows held out begin with a conversation that is trained on.", "56 of 59 held-out rows were cut."]
    said = verdict([GAIN, Compared(**{**vars(LOSS), "name": "x", "label": "x"})], doubts=doubts)
    assert said["aside"] == f"Worse on x. {doubts[0]} {doubts[1]}"
    lines = report_text({**report(verdict=said)}, SCREEN, 0).splitlines()
    assert lines[1] == said["aside"]


def new_rows(cases: int, tuned: float = 1.71) -> Compared:
    return Compared(
        **{**vars(loss(1.92, tuned, 0.1, cases=cases)), "name": "new_rows_loss", "label": "loss of new rows"}
    )


@pytest.mark.parametrize(
    ("new", "reading", "sentence", "aside"),
    [
        (
            new_rows(30), "better", "Better than the base: held-out loss 1.92 -> 1.71.",
            "10 of 40 held-out rows resemble rows to train on; the verdict is of the other 30.",
        ),
        (
            new_rows(30, 1.92), "no_clear_change",
            "No clear change: held-out loss 1.92 -> 1.92, and the interval of the change includes zero.",
            "10 of 40 held-out rows resemble rows to train on; the verdict is of the other 30.",
        ),
        (
            new_rows(29), "better",
            "Better than the base: 11 of 40 held-out rows resemble rows to train on, and the other 29 are too few; "
            "held-out loss 3.46 -> 1.31.", "",
        ),
    ],
    ids=["better", "a gain that was memory", "too few"],
)  # fmt: skip
def test_the_verdict_is_of_the_rows_that_resemble_none_to_train_on(
    new: Compared, reading: str, sentence: str, aside: str
) -> None:
    said = verdict([GAIN, new], texts=True)
    assert (said["reading"], said["sentence"], said["aside"]) == (reading, sentence, aside)


def test_both_losses_are_measured_where_some_rows_are_given_away() -> None:
    ones = np.ones(4)
    base, tuned = (RowScores(loss=np.array(values), tokens=ones, stop_loss=ones, stops=ones, right=ones)
                   for values in ([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 4.0]))  # fmt: skip
    seen = np.array([False, True, True, False])
    every, new, *_ = loss_metrics(base, tuned, set(), stops=False, given_away=seen)
    assert (every.cases, every.base, every.tuned) == (4, 2.5, 1.75)
    assert (new.name, new.cases, new.base, new.tuned) == ("new_rows_loss", 2, 2.5, 2.5)
    for none in (np.zeros(4, bool), np.ones(4, bool), None):
        assert [m.name for m in loss_metrics(base, tuned, set(), stops=False, given_away=none)] == ["loss"]


def test_memory_of_most_rows_makes_no_gain_on_the_others() -> None:
    """60 of 100 rows known by heart, and a coin for the other 40, where saying yes and no as often is as good."""
    rng, rows, seen = np.random.default_rng(0), 100, np.arange(100) < 60
    expected, coin = ["yes", "no"] * 50, rng.permutation([True] * 20 + [False] * 20)
    right = np.concatenate([np.full(60, True), coin])
    tuned = [label if hit else "?" for label, hit in zip(expected, right, strict=True)]
    labels = Labels.of(["yes", "no"], expected, ["?", *expected[1:50], *["?"] * 50], tuned)
    ones = np.ones(rows)
    scores = [
        RowScores(loss=loss + stop, tokens=2 * ones, stop_loss=stop, stops=ones, right=ones)
        for loss, stop in (
            (rng.uniform(1.5, 2.5, rows), rng.uniform(0.5, 1, rows)),
            (np.where(seen, 0.02, np.where(right, 0.5, 0.95)), np.full(rows, 0.001)),
        )
    ]
    examples = [Example(number=n, prompt="q ", text=f"q {label}") for n, label in enumerate(expected)]

    def measures(some: np.ndarray) -> list[Compared]:
        found, of = labels.among(some), [example for example, one in zip(examples, some, strict=True) if one]
        return label_metrics(found) + cheap_metrics(of, {"yes": 0.5, "no": 0.5}, scores[1].among(some), found)

    every = measures(np.full(rows, True))
    losses = loss_metrics(*scores, set(), stops=True, given_away=seen)
    apart = verdict([*losses, *with_new_rows(every, measures(~seen))], given_away=60)
    alone = loss_metrics(scores[0].among(~seen), scores[1].among(~seen), set(), stops=True) + measures(~seen)
    assert verdict([*losses, *every], given_away=60)["reading"] == "better", "by heart"
    assert (apart["reading"], apart["sentence"]) == ("no_better_than_cheap", verdict(alone)["sentence"])
    assert apart["aside"].endswith("the verdict is of the other 40.")


def test_the_loss_without_the_stop_token_is_measured_apart_where_either_is_not_better() -> None:
    """The 20 rows known by heart lost on every token, the other 30 on the stop token alone."""
    seen, ones = np.arange(50) < 20, np.ones(50)
    base, tuned = (
        RowScores(loss=words + stop + np.linspace(-0.1, 0.1, 50), tokens=11 * ones, stop_loss=stop * ones, stops=ones,
                  right=ones)
        for words, stop in ((10 * ones, 5.0), (np.where(seen, 1.0, 10.0), 1.0))
    )  # fmt: skip
    found = {metric.name: metric.reading for metric in loss_metrics(base, tuned, set(), stops=True, given_away=seen)}
    assert (found["words_loss"], found["new_rows_words_loss"]) == ("better", "no clear change")
    said = verdict(loss_metrics(base, tuned, set(), stops=True, given_away=seen))
    assert (said["reading"], said["why"]) == ("better_by_loss", "it learned to end its answers")


@pytest.mark.parametrize(
    ("words", "names"), [(9.0, ["loss", "stop_token_loss"]), (10.0, ["loss", "stop_token_loss", "words_loss"])]
)
def test_the_loss_without_the_stop_token_is_measured_where_it_is_not_better(words: float, names: list[str]) -> None:
    """Rows of ten tokens and a stop token, whose loss falls from 5 to 1."""
    noise, ones = np.linspace(-0.1, 0.1, 40), np.ones(40)
    base, tuned = (
        RowScores(loss=rest + noise * sign + stop, tokens=11 * ones, stop_loss=stop * ones, stops=ones, right=ones)
        for rest, stop, sign in ((10.0, 5.0, 1), (words, 1.0, -1))
    )
    assert [metric.name for metric in loss_metrics(base, tuned, set(), stops=True)] == names
