"""What a verdict says of pairs, on made-up numbers: it weighs how many are preferred rightly beside the loss."""

from __future__ import annotations

from typing import Any

import pytest

from loractl.common.verdict import BADGES, MeasuredChange, ReportVerdict, answer_groups, report_verdict

UNITS = {"preference_accuracy": "%", "new_rows_preference_accuracy": "%", "repetition": "%", "answer_tokens": "tokens"}
BETTER = {"preference_accuracy": True, "new_rows_preference_accuracy": True, "preference_margin": True}


def measure(name: str, base: float, tuned: float, spread: float, cases: int = 59) -> dict[str, Any]:
    unit, higher = UNITS.get(name, "nats"), None if name == "answer_tokens" else BETTER.get(name, False)
    change = tuned - base
    judged = MeasuredChange(
        base=base, change=change, low=change - spread, high=change + spread, cases=cases, unit=unit,
        higher_is_better=higher,
    )  # fmt: skip
    known = {
        "name": name,
        "label": "loss" if name in ("cheap_loss", "few_shot_loss") else name.replace("_", " "),
        "unit": unit,
        "cases": cases,
        "base": base,
        "tuned": tuned,
    }
    return {**known, "change": change, "low": judged.low, "high": judged.high, "reading": judged.reading}


def said(*metrics: dict[str, Any], **how: Any) -> ReportVerdict:
    return report_verdict(metrics, **how)


CLOSER = {**measure("rougeL", 20.0, 60.0, 5), "unit": "%", "reading": "better"}
GAIN, LOSS, SAME = (measure("loss", base, tuned, 0.1) for base, tuned in ((0.69, 0.52), (0.52, 0.69), (0.69, 0.68)))
ROSE, FELL, STAYED = (
    measure("preference_accuracy", base, tuned, 5) for base, tuned in ((61, 78), (78, 61), (61, 62.7))
)
APART, NEARER, MARGIN = (measure("preference_margin", base, tuned, 0.5) for base, tuned in ((1, 4), (4, 1), (1, 1.2)))
UP, DOWN = "61.0 -> 78.0 % of 59 held-out pairs", "78.0 -> 61.0 % of 59 held-out pairs"
LIKELIER = "the chosen answer is the likelier one in"


@pytest.mark.parametrize(
    ("metrics", "reading", "sentence", "short"),
    [
        (
            [GAIN, ROSE, APART], "better", f"Better than the base: {LIKELIER} {UP}, loss 0.69 -> 0.52.",
            "better, chosen likelier in 61.0 -> 78.0 %, loss 0.69 -> 0.52",
        ),
        (
            [GAIN, STAYED, MARGIN], "better",
            f"Better than the base: {LIKELIER} 61.0 -> 62.7 % of 59 held-out pairs, loss 0.69 -> 0.52.",
            "better, chosen likelier in 61.0 -> 62.7 %, loss 0.69 -> 0.52",
        ),
        (
            [LOSS, FELL, MARGIN], "worse", f"Worse than the base: {LIKELIER} {DOWN}, loss 0.52 -> 0.69.",
            "worse, chosen likelier in 78.0 -> 61.0 %, loss 0.52 -> 0.69",
        ),
        (
            [SAME, STAYED, MARGIN], "no_clear_change",
            f"No clear change: {LIKELIER} 61.0 -> 62.7 % of 59 held-out pairs, loss 0.69 -> 0.68, and the interval "
            "of the loss's change includes zero.",
            "no clear change, chosen likelier in 61.0 -> 62.7 %, loss 0.69 -> 0.68",
        ),
        (
            [GAIN, FELL, MARGIN], "cant_be_judged",
            f"Can't be judged: better loss, worse preferences; {LIKELIER} {DOWN}, loss 0.69 -> 0.52.",
            "can't be judged: better loss, worse preferences, chosen likelier in 78.0 -> 61.0 %, loss 0.69 -> 0.52",
        ),
        (
            [LOSS, STAYED, APART], "cant_be_judged",
            f"Can't be judged: worse loss, better preferences; {LIKELIER} 61.0 -> 62.7 % of 59 held-out pairs, "
            "loss 0.52 -> 0.69; preference margin 1.00 -> 4.00.",
            "can't be judged: worse loss, better preferences, chosen likelier in 61.0 -> 62.7 %, loss 0.52 -> 0.69",
        ),
        (
            [SAME, ROSE, APART], "cant_be_judged",
            f"Can't be judged: better preferences, no clear change of the loss; {LIKELIER} {UP}, loss 0.69 -> 0.68.",
            "can't be judged: better preferences, no clear change of the loss, chosen likelier in 61.0 -> 78.0 %, "
            "loss 0.69 -> 0.68",
        ),
        (
            [SAME, STAYED, APART], "no_clear_change",
            f"No clear change: {LIKELIER} 61.0 -> 62.7 % of 59 held-out pairs, loss 0.69 -> 0.68, and the interval "
            "of the loss's change includes zero.",
            "no clear change, chosen likelier in 61.0 -> 62.7 %, loss 0.69 -> 0.68",
        ),
    ],
    ids=["both better", "loss better", "both worse", "neither", "fewer", "margin", "share alone", "margin alone"],
)  # fmt: skip
def test_the_share_of_pairs_and_the_loss_are_weighed_together(
    metrics: list[dict[str, Any]], reading: str, sentence: str, short: str
) -> None:
    found = said(*metrics)
    assert (found.reading, found.sentence, found.short) == (reading, sentence, short)
    assert reading in BADGES and "accuracy" not in found.aside, "it is in the sentence"


def test_too_few_pairs_are_too_few_however_much_changed() -> None:
    few = [measure("loss", 0.69, 0.2, 0.1, cases=5), measure("preference_accuracy", 20, 100, 5, cases=5)]
    found = said(*few)
    assert found.reading == "cant_be_judged"
    assert found.sentence.startswith("Can't be judged: 5 held-out pairs are too few; ")


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        (measure("answer_tokens", 41, 83, 10, cases=16), "; answers twice as long (41 -> 83 tokens)."),
        (measure("answer_tokens", 41, 130, 10, cases=16), "; answers 3.2 times as long (41 -> 130 tokens)."),
        (measure("answer_tokens", 80, 39, 10, cases=16), "; answers half as long (80 -> 39 tokens)."),
        (measure("answer_tokens", 0, 39, 10, cases=16), "; answers longer (0 -> 39 tokens)."),
        (measure("answer_tokens", 39, 0, 10, cases=16), "; answers shorter (39 -> 0 tokens)."),
        (measure("answer_tokens", 41, 60, 10, cases=16), "0.52."),
        (measure("answer_tokens", 41, 83, 50, cases=16), "0.52."),
        (measure("answer_tokens", 41, 83, 10, cases=7), "0.52."),
        (measure("answer_tokens", 0, 0, 0, cases=16), "0.52."),
    ],
    ids=["twice", "thrice", "half", "from nothing", "to nothing", "a little", "not clear", "few", "nothing"],
)  # fmt: skip
def test_answers_of_another_length_are_told_in_the_first_sentence(lengths: dict[str, Any], told: str) -> None:
    found = said(GAIN, ROSE, lengths)
    assert found.sentence.endswith(told) and found.sentence.count("answers ") == ("answers" in told)
    assert "answers" not in said(GAIN, CLOSER, lengths).sentence, "of pairs alone"


def test_chosen_answers_that_became_less_likely_and_answers_that_repeat_stand_aside() -> None:
    found = said(GAIN, ROSE, measure("chosen_loss", 1.2, 1.9, 0.1), measure("repetition", 1, 30, 5, cases=16))
    assert (found.reading, found.aside) == ("better", "Worse on chosen loss and repetition.")


def test_a_margin_that_grows_while_both_answers_become_unlikely_is_no_gain() -> None:
    """Whatever makes the rejected answers unlikelier still has a lower loss, chosen answers of noise included."""
    found = said(GAIN, ROSE, measure("chosen_loss", 2.0, 22.0, 0.5))
    assert (found.reading, found.aside) == ("cant_be_judged", "")
    assert found.sentence == (
        f"Can't be judged: better preferences, spoilt answers; {LIKELIER} 61.0 -> 78.0 % of 59 held-out pairs, "
        "loss 0.69 -> 0.52; the chosen answers' own loss rose, 2.00 -> 22.00 nats a token."
    )
    assert found.short.startswith("can't be judged: better preferences, spoilt answers")


def test_pairs_like_none_to_train_on_decide_where_they_are_enough() -> None:
    every = [GAIN, ROSE, APART]
    new = [measure("new_rows_loss", 0.69, 0.68, 0.1, cases=40)]
    new.append(measure("new_rows_preference_accuracy", 60, 55, 10, cases=40))
    found = said(*every, *new)
    assert found.reading == "no_clear_change"
    assert f"{LIKELIER} 60.0 -> 55.0 % of 40 held-out pairs, loss 0.69 -> 0.68" in found.sentence
    assert found.aside == "19 of 59 held-out rows resemble rows to train on; the verdict is of the other 40."
    worse = [measure("new_rows_loss", 0.52, 0.69, 0.1, cases=40), new[1]]
    assert said(*every, *worse).reading == "worse", "the margin is of all pairs, those that were given away too"


def test_final_pairs_are_called_so_and_without_the_share_the_loss_alone_decides() -> None:
    assert said(GAIN, ROSE, rows="final").sentence == (
        f"Better than the base: {LIKELIER} 61.0 -> 78.0 % of 59 final pairs, loss 0.69 -> 0.52."
    )
    assert said(GAIN, CLOSER).sentence == "Better than the base: held-out loss 0.69 -> 0.52."


def test_answers_to_pairs_prompts_are_one_group_and_neither_right_nor_wrong() -> None:
    answer = {"base_exact": False, "tuned_exact": True}
    assert [key for key, _, some in answer_groups([answer]) if some] == ["repaired"]
    pairs = [{**answer, "rejected": ""}, {"base_exact": False, "tuned_exact": False, "rejected": "no"}]
    assert answer_groups(pairs) == [("all", "answers", pairs)]


CHEAP_LOSS = measure("cheap_loss", 0.35, 0.53, 0.05)


def test_a_gain_that_the_labels_shares_alone_reach_is_none() -> None:
    """Random yes and no, learned as text: the base knows neither word, so the loss falls from 7.96 to 0.53."""
    gain, guessed = measure("loss", 7.96, 0.53, 0.2), measure("accuracy", 0.0, 40.0, 12.0)
    found = said(gain, {**guessed, "reading": "better"}, CHEAP_LOSS, measure("cheap_accuracy", 57.5, 40.0, 20.0))
    assert (found.reading, found.badge) == ("no_better_than_cheap", "– No better than a cheap answer")
    assert found.sentence == (
        "No better than a cheap answer: the labels' shares alone have loss 0.35; held-out loss 7.96 -> 0.53."
    )
    assert found.short == ("no better than a cheap answer: the labels' shares alone have loss 0.35, loss 7.96 -> 0.53")
    assert "against" not in found.aside


@pytest.mark.parametrize(
    "cheap",
    [
        [measure("cheap_loss", 0.35, 0.10, 0.05)],
        [CHEAP_LOSS, {**measure("cheap_accuracy", 57.5, 90.0, 8.0), "reading": "better"}],
    ],
)
def test_a_gain_over_either_of_the_two_stays_one(cheap: list[dict[str, Any]]) -> None:
    assert said(measure("loss", 7.96, 0.53, 0.2), CLOSER, *cheap).reading == "better"


@pytest.mark.parametrize(("alike", "new"), [(38, [measure("new_rows_loss", 3.0, 1.0, 0.1, cases=2)]), (40, [])])
def test_a_gain_on_rows_that_resemble_those_to_train_on_can_t_be_judged(alike: int, new: list[dict[str, Any]]) -> None:
    found = said(measure("loss", 3.0, 1.0, 0.1, cases=40), *new, given_away=alike)
    others = ", and the other 2 are too few" if new else ""
    assert found.sentence == (
        f"Can't be judged: {alike} of 40 held-out rows resemble rows to train on{others}; held-out loss 3.00 -> 1.00."
    )
    assert (found.reading, found.aside) == ("cant_be_judged", "")
    assert said(measure("loss", 3.0, 1.0, 0.1, cases=40), CLOSER, given_away=20).reading == "better", (
        "half of them are new"
    )


def test_a_gain_of_the_stop_token_alone_is_said_to_be_one() -> None:
    """Training answers of the base itself, which did not end: nothing but their end is learned."""
    found = said(measure("loss", 1.20, 0.90, 0.1), measure("words_loss", 0.80, 0.81, 0.1))
    assert (found.reading, found.badge) == ("better_by_loss", "± Better by loss only")
    assert found.sentence == (
        "Better by loss only: it learned to end its answers; held-out loss 1.20 -> 0.90; without the stop token "
        "0.80 -> 0.81, no clear change."
    )


def decided(base: float, tuned: float, spread: float, cases: int = 200) -> dict[str, Any]:
    own = measure("gsm8k", base, tuned, spread, cases)
    change = MeasuredChange(
        base=base, change=tuned - base, low=own["low"], high=own["high"], cases=cases, unit="%", higher_is_better=True
    )
    return {**own, "unit": "%", "reading": change.reading, "own": True, "decides": True}


def test_the_measure_that_a_job_names_decides_alone() -> None:
    """GSM8K's exact match compares the whole reasoning: it is 0 whatever the loss is."""
    exact = {**measure("exact_match", 0, 0, 0), "unit": "%"}
    found = said(GAIN, decided(10, 35, 8), exact)
    assert (found.reading, found.aside) == ("better", "")
    assert found.sentence == ("Better than the base: gsm8k 10.0 -> 35.0 % of 200 answers, held-out loss 0.69 -> 0.52.")
    assert found.short == "better, gsm8k 10.0 -> 35.0 %"
    assert said(LOSS, decided(10, 35, 8)).aside == "Worse on loss.", "it is said, and does not decide"
    assert said(GAIN, decided(35, 10, 8)).reading == "worse"
    none = said(GAIN, decided(10, 12, 8))
    assert none.reading == "no_clear_change" and none.sentence.endswith(
        "the interval of the change of gsm8k includes zero."
    )
    few = said(GAIN, decided(10, 60, 8, cases=19))
    assert (few.reading, few.why) == ("cant_be_judged", "19 answers are too few to say")
    unknown = {**decided(10, 35, 8, cases=0), "reading": "too few cases", "base": None, "tuned": None}
    assert said(GAIN, unknown).why == "gsm8k was not measured"


def ends(base: float, tuned: float, cases: int = 200) -> dict[str, Any]:
    """The share of answers that ended before max_new_tokens."""
    change = MeasuredChange(base=base, change=tuned - base, low=tuned - base - 5, high=tuned - base + 5, cases=cases)
    return {
        **vars(change),
        "name": "ends_by_itself",
        "label": "ended",
        "unit": "%",
        "tuned": tuned,
        "reading": "better",
    }


def test_answers_that_were_cut_are_counted_and_are_a_deciding_measure_s_reason() -> None:
    """GSM8K's number comes last: an answer that was cut before it is wrong, whatever it reasoned."""
    cut = "160 of 200 answers of the base and 4 of the tuned model were cut off"
    assert said(GAIN, CLOSER, ends(20, 98)).aside == f"{cut}."
    found = said(GAIN, decided(10, 35, 8), ends(20, 98))
    assert (found.reading, found.why, found.aside) == ("better", cut, "")
    assert found.sentence.startswith(f"Better than the base: {cut}; gsm8k 10.0 -> 35.0 % of 200 answers")
    few = said(GAIN, decided(10, 60, 8, cases=19), ends(20, 98))
    assert few.why == f"19 answers are too few to say, and {cut}"
    off = said(GAIN, decided(10, 35, 8), ends(20, 98), read_off="all hold it")
    assert (off.why, off.aside) == ("all hold it", f"{cut}.")
    assert said(GAIN, CLOSER, ends(90, 95)).aside == "", "a few"
    assert said(GAIN, CLOSER, ends(80, 80, cases=10)).aside == ""
    assert "3 of 10 answers of the base" in said(GAIN, CLOSER, ends(70, 80, cases=10)).aside


def apart(base: float, tuned: float, spread: float, cases: int) -> dict[str, Any]:
    new = decided(base, tuned, spread, cases)
    return {key: value for key, value in new.items() if key not in ("own", "decides")} | {"name": "new_rows_gsm8k"}


def test_a_deciding_measure_is_judged_on_answers_to_rows_like_none() -> None:
    """60 of 100 answers are to rows that were as good as trained on."""
    leaked, new_loss = decided(10, 60, 8, cases=100), measure("new_rows_loss", 0.69, 0.52, 0.1, cases=40)
    gone = said(GAIN, new_loss, leaked, apart(10, 11, 8, 40), given_away=60)
    assert gone.reading == "no_clear_change" and "gsm8k 10.0 -> 11.0 % of 40 answers" in gone.sentence
    about = "60 of the 100 answers of gsm8k are to rows that resemble rows to train on"
    assert gone.aside == f"{about}; the verdict is of the other 40."
    assert said(GAIN, new_loss, leaked, apart(10, 60, 8, 40), given_away=60).reading == "better"
    few = said(GAIN, new_loss, leaked, apart(10, 60, 8, 20), given_away=60)
    assert few.reading == "cant_be_judged" and "80 of the 100 answers" in few.why and few.aside == ""
    none = said(GAIN, leaked, {**apart(10, 60, 8, 0), "base": None, "tuned": None}, given_away=100)
    assert none.reading == "cant_be_judged" and "too few" not in none.why
    some = said(GAIN, decided(10, 60, 8, cases=40), apart(10, 60, 8, 25), given_away=15)
    assert some.reading == "better" and some.why.endswith(", and the other 25 are too few") and some.aside == ""
    little = said(GAIN, decided(10, 60, 8, cases=30), apart(10, 60, 8, 27), given_away=3)
    assert little.why == "" and little.aside.endswith("the other 27 are too few to judge by.")
    unsure = said(GAIN, decided(10, 60, 8, cases=40), apart(10, 15, 8, 25), given_away=15)
    assert unsure.reading == "cant_be_judged" and unsure.why.endswith(", and the other 25 show no clear gain")


def test_a_deciding_measure_must_beat_the_labels_shares_as_the_loss_must() -> None:
    """95 % of the answers are "yes": a model that always says it is right as often."""
    cheap = [measure("cheap_loss", 0.20, 0.20, 0.05), {**measure("cheap_accuracy", 95, 95, 2), "unit": "%"}]
    assert said(GAIN, decided(0, 95, 5), *cheap).reading == "no_better_than_cheap"
    beaten = {**measure("cheap_loss", 0.35, 0.05, 0.05), "reading": "better"}
    assert said(GAIN, decided(0, 95, 5), beaten).reading == "better"


def test_a_cheap_answer_on_few_rows_that_leave_the_whole_gain_open_takes_nothing_from_it() -> None:
    """The base with examples answers 24 rows, the tuned model 200: 10 -> 35 % of them, and 13 -> 33 % of those."""
    few = {**decided(12.5, 33.3, 25, cases=24), "name": "few_shot_gsm8k", "own": False, "decides": False}
    assert (few["reading"], said(GAIN, decided(10, 35, 8), few).reading) == ("no clear change", "better")
    as_good = {**few, "base": 33.3, "change": 0.0, "low": -26.0, "high": 26.0}
    assert said(GAIN, decided(10, 35, 8), as_good).reading == "no_better_than_cheap"
    none_left = {**few, "change": 8.0, "low": -8.0, "high": 24.0}
    assert said(GAIN, decided(10, 35, 8), none_left).reading == "no_better_than_cheap"


def test_a_measure_of_the_job_s_own_is_one_of_its_answers() -> None:
    own = {key: value for key, value in decided(10, 35, 8).items() if key != "decides"}
    assert said(GAIN, own).reading == "better"
    assert said(GAIN).reading == "better_by_loss"
    assert said(GAIN, {**own, "reading": "worse", "change": -25.0}).reading == "cant_be_judged"


def test_answers_are_sorted_by_the_measure_that_decides() -> None:
    wrong = {"base_exact": False, "tuned_exact": False}
    answers = [{**wrong, "decided": pair} for pair in ([False, True], [True, True], [None, None])]
    groups = [(key, len(some)) for key, _, some in answer_groups(answers)]
    assert groups == [("repaired", 1), ("broken", 0), ("wrong", 0), ("right", 1), ("unscored", 1)]
    assert [key for key, *_ in answer_groups([wrong])] == ["repaired", "broken", "wrong", "right"]


def twin(metric: dict[str, Any]) -> dict[str, Any]:
    """A measure of the rows that resemble none to train on, as a report has it."""
    kept = {key: value for key, value in metric.items() if key not in ("own", "decides")}
    return {**kept, "name": f"new_rows_{metric['name']}", "label": f"{metric['label']}, rows like none"}


def share(name: str, base: float, tuned: float, spread: float, cases: int = 100) -> dict[str, Any]:
    return {**decided(base, tuned, spread, cases), "name": name, "label": name, "own": False, "decides": False}


KNOWN, NEW_LOSS = measure("loss", 1.40, 0.15, 0.05, 100), measure("loss", 1.38, 0.36, 0.05, 40)
TOLD_APART = "60 of 100 held-out rows resemble rows to train on; the verdict is of the other 40."


def of_100(*metrics: dict[str, Any]) -> ReportVerdict:
    """Of 100 rows, 60 resemble rows to train on."""
    return report_verdict([KNOWN, twin(NEW_LOSS), *metrics], given_away=60)


def test_answers_and_cheap_ones_are_those_to_the_rows_that_the_verdict_is_of() -> None:
    """60 rows known by heart, and chance on the other 40, where the shares of the labels do as well."""
    right, cheap = share("accuracy", 49, 80, 12), measure("cheap_loss", 0.35, 0.15, 0.03, 100)
    cheap_right = share("cheap_accuracy", 50, 80, 12)
    memory = [right, twin(share("accuracy", 45, 50, 20, 40)), cheap, twin(measure("cheap_loss", 0.35, 0.36, 0.03, 40))]
    found = of_100(*memory, cheap_right, twin(share("cheap_accuracy", 50, 50, 17, 40)))
    assert (found.reading, found.aside) == ("no_better_than_cheap", TOLD_APART)
    assert found.sentence == (
        "No better than a cheap answer: the labels' shares alone have loss 0.35; held-out loss 1.38 -> 0.36."
    )
    found = of_100(*memory[:2])
    assert found.reading == "better_by_loss" and found.sentence == (
        "Better by loss only: no clear change of the answers; held-out loss 1.38 -> 0.36; accuracy 45.0 -> 50.0."
    )
    assert of_100(right, twin(share("accuracy", 45, 90, 20, 40))).reading == "better"
    worse = of_100(right, twin(share("accuracy", 80, 50, 20, 40)))
    assert (worse.reading, worse.why) == ("cant_be_judged", "better loss, worse answers")
    assert of_100(right, cheap).reading == "better", "a report of before has no others"


@pytest.mark.parametrize(
    ("left", "why"),
    [(5, "5 answers are too few to say"), (1, "1 answer is too few to say"), (0, "no answers were measured")],
)
def test_too_few_answers_to_the_other_rows_say_nothing(left: int, why: str) -> None:
    unknown = dict.fromkeys(("base", "tuned", "change", "low", "high"))
    few = {**share("exact_match", 0, 60, 20, left), **({} if left else unknown)}
    shown = {**share("few_shot_exact_match", 50, 60, 30, left), **({} if left else unknown)}
    found = of_100(
        share("exact_match", 0, 90, 9, 16), twin(few), share("few_shot_exact_match", 80, 80, 9, 16), twin(shown)
    )
    assert (found.reading, found.why, found.aside) == ("better_by_loss", why, TOLD_APART)


def test_the_end_and_the_length_are_those_of_answers_to_the_other_rows() -> None:
    short = measure("expected_tokens", 40, 30, 4, 60), twin(measure("expected_tokens", 40, 9, 4, 24))
    closer = {**CLOSER, "cases": 60}, twin({**CLOSER, "cases": 24})
    assert of_100(*closer, *short).why == "its answers are too short, 9 tokens where 40 are expected"
    words = measure("words_loss", 1.2, 0.1, 0.1, 100), twin(measure("words_loss", 1.2, 1.19, 0.1, 40))
    stop = of_100(*closer, *words)
    assert stop.why == "it learned to end its answers"
    assert stop.sentence.endswith("; without the stop token 1.20 -> 1.19, no clear change.")
    well = measure("words_loss", 1.2, 1.19, 0.1, 100), twin(measure("words_loss", 1.2, 0.1, 0.1, 40))
    assert (of_100(*closer, *well).reading, of_100(*closer, *well).aside) == ("better", TOLD_APART)


def test_a_deciding_measure_s_cheap_answers_are_to_the_rows_that_it_is_judged_on() -> None:
    own, beaten = decided(10, 60, 8, 100), share("cheap_gsm8k", 30, 60, 9)
    as_good = twin(share("cheap_gsm8k", 34, 35, 9, 40))
    assert of_100(own, twin(decided(10, 35, 8, 40)), beaten).reading == "better"
    found = of_100(own, twin(decided(10, 35, 8, 40)), beaten, as_good)
    assert (found.reading, found.why) == (
        "no_better_than_cheap",
        "the most frequent answer alone has cheap_gsm8k 34.0 %",
    )
    few = of_100(decided(10, 60, 8, 40), twin(decided(10, 35, 8, 25)), beaten, as_good)
    assert few.reading == "better" and "the other 25 are too few" in few.why, "it is judged on all, they as well"
    worse = twin(share("cheap_gsm8k", 60, 35, 9, 40))
    assert "cheap" not in of_100(decided(10, 60, 8, 40), twin(decided(10, 35, 8, 25)), beaten, worse).aside
