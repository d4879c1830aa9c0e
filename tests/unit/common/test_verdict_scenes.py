"""What a reader of the first line is told: scenes in which a lower loss means something else, and honest gains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from loractl.common.verdict import BADGES, MeasuredChange, report_verdict, word

SHARES = {
    "exact_match",
    "rougeL",
    "accuracy",
    "macro_f1",
    "cheap_accuracy",
    "preference_accuracy",
    "few_shot_rougeL",
    "cheap_rougeL",
    "cheap_form_accuracy",
    "ends_by_itself",
}
LABEL_OF = {"cheap_loss": "loss, against labels' shares", "few_shot_loss": "loss, against the base with examples"}
LENGTHS = {"answer_tokens", "expected_tokens"}


def measure(name: str, base: float, tuned: float, spread: float, cases: int = 40) -> dict[str, Any]:
    """A measure as in report.json; its interval is the change and this much to each side."""
    unit = "%" if name in SHARES else "tokens" if name in LENGTHS else "nats"
    higher = None if name in LENGTHS else name in SHARES or name == "preference_margin"
    ends = {"low": tuned - base - spread, "high": tuned - base + spread}
    judged = MeasuredChange(
        base=base, change=tuned - base, cases=cases, unit=unit, higher_is_better=higher, **ends
    )  # fmt: skip
    return {
        "name": name, "label": LABEL_OF.get(name, name.replace("_", " ")), "unit": unit,
        "cases": cases, "base": base, "tuned": tuned, "change": tuned - base, **ends,
        "reading": judged.reading,
    }  # fmt: skip


def loss(base: float, tuned: float, cases: int = 40, spread: float = 0.05) -> dict[str, Any]:
    return measure("loss", base, tuned, spread, cases)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A training as it was, and the verdict of its report."""

    name: str
    metrics: list[dict[str, Any]]
    reading: str
    why: str = ""
    how: dict[str, Any] = field(default_factory=dict)


ROUGE, EXACT = measure("rougeL", 22.4, 65.2, 18, 16), measure("exact_match", 0.0, 8.3, 12, 16)
LABELS = measure("accuracy", 0.0, 95.0, 6)
SCENES = [
    Scene(
        name="random yes and no", reading="no_better_than_cheap", why="the labels' shares alone have loss 0.35",
        metrics=[
            loss(7.96, 0.53), measure("accuracy", 0.0, 40.0, 15), measure("cheap_loss", 0.35, 0.53, 0.1),
            measure("cheap_accuracy", 57.5, 40.0, 20),
        ],
    ),
    Scene(
        name="19 of 20 say yes, and it always does", reading="no_better_than_cheap",
        why="the labels' shares alone have loss 0.20",
        metrics=[
            loss(7.96, 0.20), LABELS, measure("cheap_loss", 0.20, 0.20, 0.02), measure("cheap_accuracy", 95, 95, 0.0),
        ],
    ),
    Scene(
        name="four examples in the base's prompt do as much", reading="no_better_than_cheap",
        why="the base with training examples in its prompt has loss 0.91",
        metrics=[
            loss(4.49, 0.90), ROUGE, measure("few_shot_loss", 0.91, 0.90, 0.05, 24),
            measure("few_shot_rougeL", 63.0, 65.2, 9, 12),
        ],
    ),
    Scene(
        name="the most frequent answer does as much", reading="no_better_than_cheap",
        why="the most frequent answer alone has cheap rougeL 61.0 %",
        metrics=[loss(4.49, 0.90), ROUGE, measure("cheap_rougeL", 61.0, 63.0, 9, 16)],
    ),
    Scene(
        name="38 of 40 rows resemble rows to train on", reading="cant_be_judged",
        why="38 of 40 held-out rows resemble rows to train on, and the other 2 are too few",
        metrics=[loss(3.0, 0.2), measure("new_rows_loss", 3.0, 2.9, 0.3, 2), ROUGE], how={"given_away": 38},
    ),
    Scene(
        name="20 of 40 rows resemble rows to train on, and the others gained nothing", reading="cant_be_judged",
        why="20 of 40 held-out rows resemble rows to train on, and the other 20 show no clear gain",
        metrics=[loss(3.5, 1.9), measure("new_rows_loss", 3.5, 3.45, 0.3, 20), ROUGE], how={"given_away": 20},
    ),
    Scene(
        name="8 rows after 2 steps", reading="cant_be_judged", why="8 held-out rows are too few",
        metrics=[loss(3.10, 2.90, cases=8), measure("rougeL", 10, 25, 9, 8)],
    ),
    Scene(
        name="3 rows", reading="cant_be_judged", why="3 held-out rows are too few", metrics=[loss(3.1, 1.0, cases=3)]
    ),
    Scene(
        name="the stop token alone", reading="better_by_loss", why="it learned to end its answers",
        metrics=[loss(1.20, 0.90), measure("words_loss", 0.80, 0.81, 0.1), ROUGE],
    ),
    Scene(
        name="the loss, and answers as before", reading="better_by_loss", why="no clear change of the answers",
        metrics=[loss(2.5, 2.1), measure("rougeL", 30.0, 30.4, 8, 16)],
    ),
    Scene(name="no answers asked for", reading="better_by_loss", why="no answers were measured",
          metrics=[loss(2.5, 2.1)]),
    Scene(
        name="three answers that got worse", reading="better_by_loss", why="3 answers are too few to say",
        metrics=[loss(3.46, 1.31), measure("rougeL", 35.3, 11.1, 5, 3)],
    ),
    Scene(
        name="answers cut to three words, held out in full", reading="better_by_loss",
        why="its answers are too short, 4 tokens where 41 are expected",
        metrics=[
            loss(2.52, 2.21), measure("rougeL", 11.0, 19.0, 6, 16), measure("answer_tokens", 83, 4, 12, 16),
            measure("expected_tokens", 41, 4, 8, 16),
        ],
    ),
    Scene(
        name="better loss, worse answers", reading="cant_be_judged", why="better loss, worse answers",
        metrics=[loss(3.46, 1.31), measure("rougeL", 35.3, 11.1, 5)],
    ),
    Scene(
        name="labels in the question", reading="cant_be_judged",
        why="100 % of 40 rows held out hold the answer in the question",
        metrics=[loss(7.9, 0.01), LABELS, measure("cheap_loss", 1.1, 0.01, 0.1)],
        how={"read_off": "100 % of 40 rows held out hold the answer in the question"},
    ),
    Scene(
        name="labels by the row's length", reading="cant_be_judged", why="the length of a question tells its label",
        metrics=[loss(7.9, 0.01), LABELS, measure("cheap_loss", 1.1, 0.01, 0.1)],
        how={"read_off": "the length of a question tells its label"},
    ),
    Scene(
        name="labels that the last sign tells as well", reading="no_better_than_cheap",
        why="a rule by the form of the questions has labels right 97.5 %",
        metrics=[
            loss(7.9, 0.01), LABELS, measure("cheap_loss", 1.1, 0.01, 0.1),
            {**measure("cheap_form_accuracy", 97.5, 95.0, 5), "label": "labels right, against the last sign"},
        ],
        how={"read_off": "the last sign of a question tells its label"},
    ),
    Scene(
        name="honest: labels that the last sign tells less well", reading="better",
        metrics=[loss(7.9, 0.01), LABELS, measure("cheap_loss", 1.1, 0.01, 0.1),
                 measure("cheap_form_accuracy", 72.5, 95.0, 12)],
        how={"read_off": "the last sign of a question tells its label"},
    ),
    Scene(
        name="better preferences, spoilt answers", reading="cant_be_judged", why="better preferences, spoilt answers",
        metrics=[loss(0.69, 0.4), measure("preference_accuracy", 50, 90, 9), measure("chosen_loss", 2.0, 22.0, 0.5)],
    ),
    Scene(name="a change within the noise", reading="no_clear_change", metrics=[loss(3.5, 3.4, spread=0.3), ROUGE]),
    Scene(
        name="a change that nobody notices", reading="no_clear_change", why="too small to notice",
        metrics=[loss(16.5512, 16.5491, spread=0.0004)],
    ),
    Scene(name="worse", reading="worse", metrics=[loss(1.3, 3.4), measure("rougeL", 35.3, 11.1, 5)]),
    Scene(
        name="a loss that is no number", reading="cant_be_judged",
        why="the loss is not a number for 1 of 40 held-out rows",
        metrics=[{**loss(3.5, float("nan")), "reading": "not known", "unmeasured": 1}],
    ),
    Scene(name="honest: a help desk", reading="better",
        metrics=[loss(4.49, 0.25, 48), EXACT, ROUGE, measure("few_shot_loss", 1.1, 0.25, 0.2, 24)],
    ),
    Scene(
        name="honest: labels that are learned", reading="better",
        metrics=[
            loss(7.9, 0.11), LABELS, measure("cheap_loss", 0.69, 0.11, 0.1), measure("cheap_accuracy", 55, 95, 16),
        ],
    ),
    Scene(
        name="honest: a classifier", reading="better", how={"base": "the most frequent label"},
        metrics=[loss(0.69, 0.2, 64), measure("accuracy", 51.6, 92.2, 13, 64)],
    ),
    Scene(
        name="honest: pairs", reading="better",
        metrics=[loss(0.69, 0.52, 59), measure("preference_accuracy", 61, 78, 9, 59)],
    ),
    Scene(name="honest: plain texts", reading="better", metrics=[loss(3.5, 2.9, 48)], how={"texts": True}),
    Scene(
        name="honest: 10 of 40 rows resemble others", reading="better", how={"given_away": 10},
        metrics=[loss(3.5, 0.9), measure("new_rows_loss", 3.6, 1.1, 0.2, 30), ROUGE],
    ),
    Scene(
        name="honest: 20 of 40 rows resemble others, and the other 20 gained, too", reading="better",
        why="20 of 40 held-out rows resemble rows to train on, and the other 20 are too few",
        metrics=[loss(3.5, 0.9), measure("new_rows_loss", 3.5, 2.9, 0.3, 20), ROUGE], how={"given_away": 20},
    ),
    Scene(
        name="honest: three times as long as expected", reading="better",
        why="its answers are too long, 54 tokens where 18 are expected",
        metrics=[loss(4.5, 0.3), ROUGE, measure("expected_tokens", 18, 54, 6, 16)],
    ),
    Scene(
        name="honest: most answers cut", reading="better",
        why="2 of 16 answers of the base and 12 of the tuned model were cut off",
        metrics=[loss(4.5, 0.3), ROUGE, measure("ends_by_itself", 87.5, 25, 20, 16)],
    ),
    Scene(
        name="by loss, and most answers cut", reading="better_by_loss",
        why="no answers were measured, and 2 of 16 answers of the base and 12 of the tuned model were cut off",
        metrics=[loss(4.5, 0.3), measure("ends_by_itself", 87.5, 25, 20, 16)],
    ),
    Scene(
        name="honest: short answers, as expected", reading="better",
        metrics=[
            loss(4.5, 0.3), ROUGE, measure("answer_tokens", 40, 12, 6, 16), measure("expected_tokens", 12, 12, 2, 16)
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=[scene.name for scene in SCENES])
def test_every_face_begins_with_the_verdict_s_word_and_gives_the_reason(scene: Scene) -> None:
    said = report_verdict(scene.metrics, **scene.how)
    assert (said.reading, said.why) == (scene.reading, scene.why)
    begins = BADGES[scene.reading][2:]
    assert word(said.reading) == begins and said.badge.endswith(begins)
    assert said.sentence.startswith(begins) and said.short.startswith(begins.lower())
    assert said.why in said.sentence and said.why in said.short
    honest = scene.name.startswith("honest")
    assert honest == (said.badge == "✓ Better"), "what is green is what may be believed"


def test_what_became_of_the_answers_lengths_is_said_below() -> None:
    shorter, expected = measure("answer_tokens", 83, 4, 12, 16), measure("expected_tokens", 4, 4, 1, 16)
    said = report_verdict([loss(2.52, 2.21), ROUGE, shorter, expected])
    assert said.reading == "better" and said.aside == "Answers became shorter, 83 -> 4 tokens; expected are 4."
    same = report_verdict([loss(2.5, 2.2), ROUGE, measure("answer_tokens", 12, 13, 2, 16), expected])
    assert same.aside == ""
    longer = [measure("answer_tokens", 40, 41, 2, 16), measure("expected_tokens", 12, 41, 2, 16)]
    assert report_verdict([loss(2.5, 2.2), ROUGE, *longer]).aside == "Answers have 41 tokens; expected are 12."
    longer = [measure("answer_tokens", 40, 23, 2, 16), measure("expected_tokens", 12, 23, 2, 16)]
    said = report_verdict([loss(2.5, 2.2), ROUGE, *longer])
    assert (said.why, said.aside) == ("", "Answers became shorter, 40 -> 23 tokens; expected are 12.")


def test_what_takes_nothing_from_a_gain_is_said_below() -> None:
    half = report_verdict([loss(4.5, 0.3), ROUGE, measure("ends_by_itself", 0, 50, 20, 16)])
    assert (half.why, half.aside) == ("", "16 of 16 answers of the base and 8 of the tuned model were cut off.")
    few = report_verdict([loss(3.5, 0.9, 28), measure("new_rows_loss", 3.5, 2.9, 0.3, 26), ROUGE], given_away=2)
    assert few.reading == "better" and few.why == "", "too few rows to matter"


@pytest.mark.parametrize(
    "told", [[measure("words_loss", 0.80, 0.79, 0.1)], [measure("expected_tokens", 40, 6, 8)]], ids=["end", "length"]
)
def test_answers_that_became_right_are_better_whatever_their_end_and_length(told: list[dict[str, Any]]) -> None:
    gain = [loss(1.20, 0.90), measure("exact_match", 0.0, 88.0, 9), *told]
    said = report_verdict(gain)
    assert said.reading == "better" and said.sentence.startswith("Better than the base: held-out loss 1.20 -> 0.90")
    if told[0]["name"] == "words_loss":
        assert said.aside == "Without the stop token the loss is 0.80 -> 0.79, no clear change."
    nearer = report_verdict([loss(1.20, 0.90), ROUGE, *told])
    assert nearer.reading == "better_by_loss", "ROUGE may gain by that alone"


def deciding(base: float, tuned: float, spread: float, cases: int = 100) -> dict[str, Any]:
    own = measure("exact_match", base, tuned, spread, cases)
    return {**own, "name": "yesno", "label": "yesno", "own": True, "decides": True}


def test_a_deciding_measure_is_compared_with_its_own_cheap_answers() -> None:
    frequent = {**measure("cheap_accuracy", 95, 95, 0.0, 100), "name": "cheap_yesno", "label": "yesno, against"}
    beaten = {**frequent, "base": 40.0, "change": 55.0, "low": 45.0, "high": 65.0, "reading": "better"}
    shown = {**frequent, "name": "few_shot_yesno"}
    gain = [loss(7.9, 0.2, 100), deciding(0, 95, 6)]
    assert report_verdict(gain).reading == report_verdict([*gain, beaten]).reading == "better"
    said = report_verdict([*gain, frequent])
    assert (said.reading, said.why) == ("no_better_than_cheap", "the most frequent answer alone has yesno 95.0 %")
    assert report_verdict([*gain, beaten, shown]).why == (
        "the base with training examples in its prompt has yesno 95.0 %"
    )  # fmt: skip
